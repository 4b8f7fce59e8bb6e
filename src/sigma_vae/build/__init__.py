"""Names and saved models into objects: the one place that knows what a name means."""

from sigma_vae.build.names import check_network, data, likelihood, network, vae
from sigma_vae.build.saved import Saved, load, save, sized
from sigma_vae.naming import prior, prior_name

__all__ = ["Saved", "check_network", "data", "likelihood", "load", "network", "prior", "prior_name", "save", "sized", "vae"]
