"""Odd rows of a table: train on the rows that are there, and score new ones. Lower is odder.

python -m examples.anomaly
"""

import numpy as np
import pandas as pd

from sigma_vae import models
from sigma_vae.config import ModelConfig, TrainingConfig
from sigma_vae.evaluation import score
from sigma_vae.training import fit


def main(steps: int = 1000) -> pd.DataFrame:
    """Train on usual rows, score new ones of which every tenth has a wrong column, and return them by their scores."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(3, 6))

    def rows(n: int) -> pd.DataFrame:
        return pd.DataFrame(rng.normal(size=(n, 3)) @ weights + 0.2 * rng.normal(size=(n, 6)), columns=list("abcdef"))

    data = models.data(rows(2000))
    vae = models.vae(ModelConfig("mlp", "gaussian/optimal-channel", latent_dim=3), data.shape, data.scaling)
    fit(vae, data, TrainingConfig(max_steps=steps), progress=False)
    new = rows(200)
    new.loc[::10, "c"] += 4
    scores = score(vae, new, like=data)
    bound = (scores.log_likelihood - scores.rate).numpy()
    found = new.assign(bound_nats=bound, wrong=new.index % 10 == 0).sort_values("bound_nats")
    print(f"{int(found.wrong[:20].sum())} of the 20 oddest rows are those that were changed")
    return found


if __name__ == "__main__":
    main()
