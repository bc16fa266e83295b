"""What a spectrum says about a model."""

from .spectra import FRACTIONS, LayerSpectrum, spectra

__all__ = ["FRACTIONS", "LayerSpectrum", "spectra"]
