"""``sigma-vae`` and ``python -m sigma_vae``: the command line, or what to install for it."""

import sys

__all__ = ["run"]


def run() -> int:
    """Hand over to the command line, where its packages are installed."""
    try:
        from sigma_vae.cli import main
    except ModuleNotFoundError as error:
        print(f"sigma-vae: the command line needs {error.name}: pip install 'sigma-vae[full]'", file=sys.stderr)
        return 1
    return main()


if __name__ == "__main__":
    sys.exit(run())
