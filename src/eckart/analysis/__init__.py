"""What a spectrum says about a model: one short file a published analysis."""

from .analyze import analyze
from .contract import Analysis, AnalysisMethod, Subject
from .matrix_nuclear_norm import MatrixNuclearNorm
from .spectra import FRACTIONS, LayerSpectrum, spectra

__all__ = [
    "FRACTIONS",
    "Analysis",
    "AnalysisMethod",
    "LayerSpectrum",
    "MatrixNuclearNorm",
    "Subject",
    "analyze",
    "spectra",
]
