"""What a spectrum says about a model: one short file a published analysis."""

from .analyze import analyze
from .compare import Comparison, LayerDifference, compare
from .contract import Analysis, AnalysisMethod, Subject
from .gradient_spectra import GradientSpectra, rank_examples
from .head_channels import edit_component, steer_component
from .intruder_dimensions import IntruderDimensions
from .locally_linear import LocallyLinear
from .locally_linear_steering import steering
from .lora_limits import LoRALimits
from .matrix_nuclear_norm import MatrixNuclearNorm
from .overlaps import SubspaceOverlaps, subspace_overlaps
from .reduce_intruders import Reduction, reduce_intruders
from .spectra import FRACTIONS, RATIOS, LayerSpectrum, spectra
from .talking_heads import TalkingHeads

__all__ = [
    "FRACTIONS",
    "RATIOS",
    "Analysis",
    "AnalysisMethod",
    "Comparison",
    "GradientSpectra",
    "IntruderDimensions",
    "LayerDifference",
    "LayerSpectrum",
    "LoRALimits",
    "LocallyLinear",
    "MatrixNuclearNorm",
    "Reduction",
    "Subject",
    "SubspaceOverlaps",
    "TalkingHeads",
    "analyze",
    "compare",
    "edit_component",
    "rank_examples",
    "reduce_intruders",
    "spectra",
    "steer_component",
    "steering",
    "subspace_overlaps",
]
