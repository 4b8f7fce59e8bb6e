"""A run folder from a stranger: whatever its files hold, no code of theirs is run, and what is wrong is said."""

import ast
import io
import json
import pickle
import resource
import shutil
import struct
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from sigma_vae import models, runs
from sigma_vae.cli import COMMANDS, main
from sigma_vae.config import RunConfig, read, write
from sigma_vae.likelihoods.scales import OLD_BOUNDS
from sigma_vae.runs.folder import read_json
from sigma_vae.training.checkpoints import FORMAT, SEAL_BYTES, read_sealed, write_sealed

PACKAGE = Path(__file__).parent.parent / "src" / "sigma_vae"
SOURCES = sorted(PACKAGE.rglob("*.py"))


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self):
        return Path.touch, (Path(self.trace),)


def pickled(trace: Path) -> bytes:
    return pickle.dumps(Payload(trace))


def archived(trace: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"format": FORMAT, "model": {}, "step": 1, "x": Payload(trace)}, file)
    return file.getvalue()


def as_array(trace: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Payload(trace)], dtype=object), allow_pickle=True)
    return file.getvalue()


def sealed(trace: Path) -> bytes:
    """With the digest that whole checkpoints have: a stranger can compute it as well."""
    with tempfile.TemporaryDirectory() as folder:
        write_sealed({"format": FORMAT, "model": {}, "step": 1, "x": Payload(trace)}, Path(folder) / "a")
        return (Path(folder) / "a").read_bytes()


def as_yaml(trace: Path) -> bytes:
    return f'!!python/object/apply:os.system ["touch {trace}"]\n'.encode()


FORMS = {"pickle": pickled, "torch": archived, "sealed torch": sealed, "numpy": as_array, "yaml": as_yaml}
FILES = [
    "checkpoints/last.ckpt", "checkpoints/previous.ckpt", "checkpoints/best.ckpt", "config.yaml", "environment.json", "metrics.csv",
    "evaluation.json", "model/model.json", "model/model.safetensors", "non-finite.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_payloads_do_run_where_they_are_trusted(form, tmp_path):
    """Else the tests below could not fail."""
    import yaml

    (tmp_path / "a").write_bytes(form(tmp_path / "trace"))
    if form is as_yaml:
        yaml.unsafe_load((tmp_path / "a").read_text())
    elif form is pickled:
        pickle.loads((tmp_path / "a").read_bytes())
    elif form is as_array:
        np.load(tmp_path / "a", allow_pickle=True)
    else:
        torch.load(tmp_path / "a", weights_only=False)
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_payload_in_a_run_folder_is_not_run(name, digits_run, tmp_path, capsys):
    trace = tmp_path / "trace"
    for form in FORMS.values():
        run = shutil.copytree(digits_run, tmp_path / "run")
        (run / name).write_bytes(form(trace))
        if name == "checkpoints/previous.ckpt":
            (run / "checkpoints" / "last.ckpt").unlink()
        words = [["resume", str(run)], ["sample", str(run), "--n", "1"], ["rerun", str(run)]]
        words = words[1:] if name.startswith(("model", "evaluation", "non-finite")) else words[:1]
        words += [["compare", str(run), str(digits_run)]] if "evaluation" in name else []
        words += [["replay", str(run / name), "--out", str(tmp_path / "new")]] if "config" in name else []
        for command in words:
            assert main(command) in (0, 1)
            assert "Traceback" not in capsys.readouterr().err
        assert not trace.exists()
        shutil.rmtree(run)


BANNED = {
    "eval", "exec", "compile", "__import__", "import_module", "unsafe_load", "full_load", "system", "popen", "loads_pickle",
}  # fmt: skip


OWN_MODULES = {
    "registry.py": {"importlib.import_module(self.home)", "importlib.import_module(module.name)"},
    "training/callbacks.py": {"importlib.import_module(package)"},
    "data/files.py": {"import_module(module)"},
    "__init__.py": {"import_module(f'{__name__}.{home}')", "import_module(f'{__name__}.{name}')"},
    "cli/__init__.py": {"import_module(f'{__name__}.{module}')"},
    "likelihoods/__init__.py": {"import_module(f'{__name__}.{home}')"},
    "vae.py": {
        "import_module('sigma_vae.evaluation.suite')",
        "import_module('matplotlib')",
        "import_module('sigma_vae.evaluation.plots')",
        "import_module('sigma_vae.hub')",
    },
}  # fmt: skip
"""Imports when a module is first needed, of names that stand in the sources: the package's own modules, and packages of loggers."""


def test_the_sources_have_no_call_that_runs_what_it_reads():
    found = []
    for path in SOURCES:
        for call in (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            options = {option.arg: ast.unparse(option.value) for option in call.keywords}
            wrong = (
                (isinstance(call.func, ast.Name) and name in BANNED)
                or name.rpartition(".")[2] in BANNED - {"eval", "compile"}  # a module's mode, and a graph's making
                or (name == "torch.load" and options.get("weights_only") != "True")
                or options.get("allow_pickle") == "True"
                or options.get("trust_remote_code") == "True"
                or name in ("pickle.load", "pickle.loads", "yaml.load", "joblib.load", "pd.read_pickle")
            )
            if wrong and ast.unparse(call) not in OWN_MODULES.get(path.relative_to(PACKAGE).as_posix(), ()):
                found.append(f"{path.name}:{call.lineno} {name}")
    assert found == []


FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def assert_refused_or(kind, function, *arguments):
    """A sentence or a whole result; any other error is an error."""
    with suppress(ValueError):
        assert isinstance(function(*arguments), kind)


def altered(draw, whole):
    """A true structure with one of its values exchanged."""
    whole = json.loads(json.dumps(whole))
    place = whole
    while isinstance(place, dict) and place:
        key = draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or not place[key] or draw(st.booleans()):
            place[key] = draw(plain | st.sampled_from([10**12, -1, 2**63, "hierarchical:9x999999999", "mixture:10000000000"]))
            return whole
        place = place[key]
    return whole


@FUZZ
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(str.encode) | plain.map(lambda p: repr(p).encode()))
def test_any_bytes_for_a_config_are_a_config_or_refused(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "config.yaml"
    path.write_bytes(content)
    assert_refused_or(RunConfig, read, path, RunConfig)
    assert_refused_or(dict, read_json, path)


@FUZZ
@given(data=st.data())
def test_any_structure_for_a_config_is_a_config_or_refused(data, digits_run, tmp_path_factory):
    import yaml

    whole = yaml.safe_load((digits_run / "config.yaml").read_text())
    path = tmp_path_factory.mktemp("fuzz") / "config.yaml"
    path.write_text(json.dumps(altered(data.draw, whole)))
    assert_refused_or(RunConfig, read, path, RunConfig)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 5_000,
        "!!bool maybe",
        "!!timestamp abc",
        '!!int ""',
        "a: &a [x, x]\n"
        + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)),
        "data: &a [*a, *a]",
        "a" * (2**20 + 1),
        "0x" + "f" * 10_000,
    ],
)
def test_a_config_that_is_a_trap_is_refused(content, tmp_path):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        read(tmp_path / "config.yaml", RunConfig)


BOMB = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("content", "says"),
    [(BOMB, "anchor or an alias"), ("a: &b 1", "anchor"), ("a: *b", "alias"), ("a: {<<: {b: 1}}", "merges")],
)
def test_a_config_that_stands_for_a_longer_one_is_refused_before_it_is_built(content, says, tmp_path, monkeypatch):
    monkeypatch.setattr("yaml.safe_load", lambda _: pytest.fail("built"))
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.yaml cannot be read as YAML .*{says}"):
        read(tmp_path / "config.yaml", RunConfig)


@pytest.fixture(scope="module")
def small_memory():
    """A gigabyte more than the process has: whoever takes terabytes fails, and not only in a test."""
    if sys.platform != "linux":
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def with_description(digits_run, folder: Path, description) -> Path:
    folder.mkdir()
    shutil.copy(digits_run / "model" / "model.safetensors", folder / "model.safetensors")
    (folder / "model.json").write_text(description if isinstance(description, str) else json.dumps(description))
    return folder


@FUZZ
@given(data=st.data())
def test_any_description_of_a_model_is_one_or_refused(data, digits_run, small_memory, tmp_path_factory):
    whole = json.loads((digits_run / "model" / "model.json").read_text())
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    assert_refused_or(models.Saved, models.load, with_description(digits_run, folder, altered(data.draw, whole)))


SIZES = [
    {"latent_dim": 10**12}, {"width": 10**12}, {"latent_dim": 10**6, "width": 10**6}, {"likelihood": "logistic-mixture:1000000000000"},
    {"prior": "mixture:1000000000000"}, {"network": "hierarchical:8x100000000/8x100000000"}, {"network": "residual", "width": 10**7},
    {"likelihood": "categorical"}, {"network": "sequence", "context_frames": 10**12},
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("shape", [[1, 8, 8], [1, 10**9, 10**9]], ids=str)
def test_a_model_of_absurd_size_is_refused_without_taking_memory(sizes, shape, digits_run, small_memory, tmp_path):
    whole = json.loads((digits_run / "model" / "model.json").read_text())
    whole["model"] |= sizes
    whole["shape"] = shape
    if sizes == {"likelihood": "categorical"}:
        whole["scaling"]["levels"] = 10**12
    with pytest.raises(ValueError, match=r"."):
        models.load(with_description(digits_run, tmp_path / "model", whole))


@FUZZ
@given(data=st.data())
def test_any_bytes_for_weights_are_refused_or_weights(data, digits_run, small_memory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(digits_run / "model", folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    kind = data.draw(st.sampled_from(["cut", "flip", "any", "claims"]))
    if kind == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif kind == "flip":
        content[data.draw(st.integers(0, 2000))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "any":
        content = data.draw(st.binary(max_size=300))
    else:  # terabytes, in the header's length or in a tensor's shape
        size = data.draw(st.sampled_from([10**6, 2**40, 2**62]))
        header = json.dumps({"x": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
        content = struct.pack("<Q", data.draw(st.sampled_from([len(header), 2**40, 2**63]))) + header + bytes(64)
    (folder / "model.safetensors").write_bytes(content)
    if kind == "flip":  # perhaps in a weight, which is as good a number as any
        assert_refused_or(models.Saved, models.load, folder)
    else:
        with pytest.raises(ValueError, match="does not hold the weights"):
            models.load(folder)


@FUZZ
@given(data=st.data())
def test_any_evaluation_compares_or_is_refused(data, digits_run, tmp_path_factory):
    run = tmp_path_factory.mktemp("fuzz") / "run"
    (run / "model").mkdir(parents=True)
    shutil.copy(digits_run / "model" / "model.safetensors", run / "model")
    whole = json.loads((digits_run / "evaluation.json").read_text())
    report = altered(data.draw, whole) if data.draw(st.booleans()) else data.draw(plain)
    (run / "evaluation.json").write_text(json.dumps(report))
    assert_refused_or(list, runs.compare, [run, digits_run])


@FUZZ
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_every_flipped_bit_and_every_cut_of_a_checkpoint_is_found(place, bit, cut, digits_run, tmp_path_factory):
    from sigma_vae.training.checkpoints import damage

    content = bytearray((digits_run / "checkpoints" / "last.ckpt").read_bytes())
    assert len(content) > SEAL_BYTES
    at = int(place * len(content))
    content[at] ^= 1 << bit
    path = tmp_path_factory.mktemp("fuzz") / "last.ckpt"
    path.write_bytes(content[:at] if cut else content)
    assert damage(path) is not None


STEPS = {
    "as it was": ({}, {}, None),
    "noise of another type": ({"rng": torch.get_rng_state().float()}, {}, "holds no step"),
    "a number for noise": ({"rng": torch.tensor(1, dtype=torch.uint8)}, {}, "holds no step"),
    "an example of another shape": ({"x": torch.zeros(2, 1, 9, 9)}, {}, "does not fit"),
    "no choices": ({}, {"choices": None}, "is not a Choices"),
    "a huge network": ({}, {"width": 10**9}, "does not fit"),
    "a huge example": ({}, {"shape": [1, 10**6, 10**6]}, "does not fit"),
}


@pytest.mark.parametrize(("tensors", "words", "says"), STEPS.values(), ids=STEPS)
def test_a_step_of_a_stranger_is_done_again_or_refused(tensors, words, says, digits_run, small_memory, tmp_path):
    described = json.loads((digits_run / "model" / "model.json").read_text())
    choices = json.loads((digits_run / "environment.json").read_text())["choices"]
    about = {
        "step": 1,
        "split": "train",
        "choices": choices,
        "shape": described["shape"],
        "scaling": described["scaling"],
    } | words
    weights = {f"weights.{name}": value for name, value in load_file(digits_run / "model" / "model.safetensors").items()}
    batch = {"x": torch.zeros(2, 1, 8, 8), "positions": torch.arange(2), "rng": torch.get_rng_state()}
    save_file(weights | batch | tensors, tmp_path / "non-finite.safetensors", metadata={"about": json.dumps(about)})
    config = read(digits_run / "config.yaml", RunConfig)
    write(tmp_path / "config.yaml", replace(config, model=replace(config.model, width=words.get("width", config.model.width))))
    if says is None:
        assert runs.rerun(tmp_path)["begins_in"] == []
        return
    with pytest.raises(ValueError, match=says):
        runs.rerun(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["network.decoder.0.weight", "network.encoder.1.bias", "likelihood.scale.density_log_scale"])
def test_weights_that_are_not_finite_are_refused_by_every_command(name, value, digits_run, tmp_path, capsys):
    run = shutil.copytree(digits_run, tmp_path / "run")
    weights = load_file(run / "model" / "model.safetensors")
    weights[name].flatten()[-1] = value
    save_file(weights, run / "model" / "model.safetensors")
    for words in (["sample"], ["score"], ["encode"], ["reconstruct"], ["evaluate"], ["calibrate"], ["fit-prior"]):
        assert main([*words, str(run)]) == 1
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        assert f"the first is {name}" in said[0]


@pytest.mark.parametrize("damage", ["extra comma", "word for a number", "no step"])
def test_a_damaged_table_of_metrics_is_told_at_resume(damage, digits_run, tmp_path, capsys):
    run = shutil.copytree(digits_run, tmp_path / "run")
    head, first, *rest = (run / "metrics.csv").read_text().splitlines()
    number = next(cell for cell in first.split(",") if "." in cell)
    first = {
        "extra comma": first + ",7",
        "word for a number": first.replace(number, "much"),
        "no step": first.replace("-1", ""),
    }[damage]
    (run / "metrics.csv").write_text("\n".join([head, first, *rest]) + "\n")
    assert main(["resume", str(run), "--epochs", "100"]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "is no table of metrics" in said[0]


HUGE = {
    "samples": ["sample", "RUN", "--n", "100000000000"],
    "latents": ["train", "digits", "--latent-dim", "1000000000000", "--network", "mlp"],
    "width": ["train", "digits", "--width", "1000000000000", "--network", "mlp"],
    "convolutions": ["train", "digits", "--width", "1000000000", "--network", "conv"],
    "mixture": ["train", "digits", "--likelihood", "logistic-mixture:1000000000000", "--network", "mlp"],
    "ladder": ["train", "digits", "--network", "hierarchical:8x100000000"],
}


@pytest.mark.parametrize("words", HUGE.values(), ids=HUGE)
def test_absurd_sizes_are_told_in_a_line(words, digits_run, small_memory, tmp_path, capsys):
    words = [str(digits_run) if word == "RUN" else word for word in words]
    assert main([*words, "--out", str(tmp_path / ("a.png" if words[0] == "sample" else "run"))]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


EXTREME = ["0", "-1", "1e308", "-1e308", "nan", "inf", "-inf", str(10**18), str(10**400)]
SMALL = ["--network", "mlp", "--width", "4", "--latent-dim", "2", "--out", "OUT"]
CLIPS = ["--network", "sequence", "--width", "4", "--latent-dim", "2", "--frames", "6", "--out", "OUT"]
PLACES = {  # words with which each command is called, and those for options that need other data
    "inspect": {"": ["digits"], "crop size": ["PICTURES"], "frames test_frames frame_step": ["CLIPS", "--frames", "6"]},
    "train": {
        "": ["digits", *SMALL],
        "crop size": ["PICTURES", *SMALL],
        "frames test_frames frame_step context_frames": ["CLIPS", *CLIPS],
    },
    "resume": {"": ["RUN"]},
    "evaluate": {"": ["RUN"]},
    "calibrate": {"": ["RUN"]},
    "sample": {"": ["RUN", "--out", "OUT.npz"]},
    "reconstruct": {"": ["RUN", "--out", "OUT.npz"]},
    "predict": {"": ["VIDEO", "--out", "OUT.npz"]},
    "score": {"": ["RUN", "--out", "OUT.csv"]},
    "explain": {"": ["--shape", "1,8,8"]},
    "new": {"": ["digits", "--out", "OUT.yaml"]},
    "impute": {"": ["TABLE", "CELLS", "--out", "OUT.csv"]},
    "traverse": {"": ["RUN", "--out", "OUT.npz"]},
    "interpolate": {"": ["RUN", "--out", "OUT.npz"]},
    "compress": {"": ["RUN", "PICTURE", "--out", "OUT.sv"]},
}


def is_number(kind):
    return kind in (int, float) or any(map(is_number, get_args(kind)))


def numbers_of(hints):
    """Names of the options whose values are numbers, those of configs included."""
    for name, kind in hints.items():
        bare = get_args(kind)[0] if hasattr(kind, "__metadata__") else kind
        if is_dataclass(bare):
            of_fields = get_type_hints(bare, include_extras=True)
            yield from numbers_of({field.name: of_fields[field.name] for field in fields(bare)})
        elif is_number(bare):
            yield name


NUMBERS = [
    (command, option)
    for command, about in COMMANDS.items()
    if not about.commands  # of a study: the number of workers and retries, elsewhere
    for option in numbers_of({k: v for k, v in get_type_hints(about.load(), include_extras=True).items() if k != "return"})
]


@pytest.fixture(scope="module")
def extreme(digits_run, tmp_path_factory):
    """What commands may be called with."""
    folder, random = tmp_path_factory.mktemp("extreme"), np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for video in range(6):
        (folder / "clips" / str(video)).mkdir(parents=True)
        for frame in range(8):
            picture = Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8))
            picture.save(folder / "clips" / str(video) / f"{frame}.png")
            picture.save(folder / "pictures" / f"{video}-{frame}.png")
    clips = [str(folder / "clips"), *CLIPS[:-1], str(folder / "video"), "--max-steps", "1", "--batch-size", "2"]
    assert main(["train", *clips, "--json"]) == 0
    shutil.copytree(digits_run, folder / "run")
    cells = pd.DataFrame({"size": random.standard_normal(40), "kind": ["a", "b"] * 20})
    cells.to_csv(folder / "cells.csv", index=False)
    table = [str(folder / "cells.csv"), *SMALL[:-1], str(folder / "table"), "--likelihood", "mixed", "--max-steps", "1"]
    assert main(["train", *table, "--json"]) == 0
    places = {
        "RUN": "run",
        "TABLE": "table",
        "CELLS": "cells.csv",
        "PICTURE": "pictures/0-0.png",
        "PICTURES": "pictures",
        "CLIPS": "clips",
        "VIDEO": "video",
        "OUT": "out",
        "OUT.npz": "o.npz",
        "OUT.csv": "o.csv",
        "OUT.yaml": "o.yaml",
        "OUT.sv": "o.sv",
    }
    return {word: str(folder / name) for word, name in places.items()}


@pytest.mark.parametrize(("command", "option"), NUMBERS, ids=map(" ".join, NUMBERS))
def test_no_number_breaks_a_command(command, option, extreme, small_memory, capsys, monkeypatch, tmp_path):
    """Each is refused in a line, within seconds and in bounded memory, or is legal: then nothing is trained or measured."""

    def legal(*arguments, **options):
        raise ValueError("legal")

    monkeypatch.chdir(tmp_path)
    for module, name in (("train", "_finish"), ("evaluate", "measure"), ("evaluate", "save_refitted")):
        monkeypatch.setattr(sys.modules[f"sigma_vae.runs.{module}"], name, legal)
    special = next((words for names, words in PLACES[command].items() if option in names.split()), PLACES[command][""])
    words = [extreme.get(word, word) for word in special]
    flag = f"--{option.replace('_', '-')}"
    if flag in words:
        at = words.index(flag)
        del words[at : at + 2]
    for value in EXTREME:
        shutil.rmtree(extreme["OUT"], ignore_errors=True)
        begun = time.monotonic()
        try:
            code = main([command, *words, flag, value])
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        assert time.monotonic() - begun < 10, value
        assert code == 2 or (code == 1 and len(said.err.strip().splitlines()) == 1) or code == 0, (value, said.err)
        assert code != 0 or "nan" not in said.out, value


def test_a_checkpoint_of_another_size_is_told_at_resume(digits_run, tmp_path, capsys):
    run = shutil.copytree(digits_run, tmp_path / "run")
    config = read(run / "config.yaml", RunConfig)
    write(run / "config.yaml", replace(config, model=replace(config.model, width=(config.model.width or 400) + 1)))
    assert main(["resume", str(run), "--epochs", "100"]) == 1
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert "does not hold the weights of this model" in said


def changed(path, value):
    """Exchange a value of a run's file for another: of JSON, or of a sealed checkpoint."""

    def change(run):
        name, *keys = path.split(":")
        file = run / name
        content = read_sealed(file) if name.endswith(".ckpt") else json.loads(file.read_text())
        place = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        file.unlink()
        write_sealed(content, file) if name.endswith(".ckpt") else file.write_text(json.dumps(content))

    return change


LAST, MODEL = "checkpoints/last.ckpt", "model/model.json:scaling"
SCORE, RESUME = ["score"], ["resume", "--epochs", "7"]
CHANGED = {
    **{f"{LAST}:{key}": (f"{LAST}:{key}", value, RESUME) for key, value in {
        "model": {}, "optimizer": 7, "skipped_steps": "x", "skipped_in_a_row": None, "data": [7], "noise": 7, "seconds": "x",
        "history": [7], "callbacks": 7, "best": {},
    }.items()},
    "no std": (f"{MODEL}:mean", [0.5], SCORE),
    "std 0": (f"{MODEL}", {"levels": None, "mean": [0.5], "deviation": [0.0]}, SCORE),
    "two stds": (f"{MODEL}", {"levels": None, "mean": [0.5], "deviation": [1.0, 1.0]}, SCORE),
    "infinite mean": (f"{MODEL}", {"levels": None, "mean": [float("inf")], "deviation": [1.0]}, SCORE),
    "one level": (f"{MODEL}:levels", 1, SCORE),
    "columns": ("environment.json:data:columns", 7, ["score", "--data", "digits"]),
    "no record": ("environment.json:data", [], ["score", "--data", "digits"]),
}  # fmt: skip


@pytest.mark.parametrize(("path", "value", "words"), CHANGED.values(), ids=CHANGED)
def test_files_with_another_content_are_told_in_a_line(path, value, words, digits_run, tmp_path, capsys):
    run = shutil.copytree(digits_run, tmp_path / "run")
    changed(path, value)(run)
    command, *options = words
    assert main([command, str(run), *options]) == 1
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert path.partition(":")[0] in said


def test_bounds_are_no_section(digits_run, tmp_path, capsys):
    run = shutil.copytree(digits_run, tmp_path / "run")
    changed("evaluation.json:elbo", None)(run)
    assert main(["compare", str(run), str(digits_run)]) == 0
    capsys.readouterr()


def test_a_resumed_checkpoint_from_before_bounds_were_saved_keeps_the_old_ones(digits_run, tmp_path):
    run = shutil.copytree(digits_run, tmp_path / "run")
    path = run / "checkpoints" / "last.ckpt"
    content = read_sealed(path)
    for weights in (content["model"], content["current"]):
        del weights["likelihood.scale.log_bounds"]
    content["best"] = {"score": None, "step": None, "seal": None}
    write_sealed(content, path)
    runs.resume(run, epochs=read(run / "config.yaml", RunConfig).training.epochs + 1, progress=False)
    bounds = load_file(run / "model" / "model.safetensors")["likelihood.scale.log_bounds"]
    torch.testing.assert_close(bounds, torch.tensor(OLD_BOUNDS))
