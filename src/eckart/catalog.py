"""The table of contents: one row a method, and the only registry there is.

Command help, the method pages, the measured table and the test parameters are generated from these rows. A row is
plain data, so reading the catalog imports no method and no tensor library; ``Method.load`` imports one.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

Status = Literal["planned", "experimental", "measured", "stable"]


class UnknownMethodError(ValueError):
    """No method of that name (in that family); the message names the nearest ones."""


@dataclass(frozen=True, slots=True)
class Method:
    """One published method.

    Attributes:
        name: The name in the literature, lower case with hyphens; unique over all families.
        family: The room it belongs to, the package ``eckart.<family>``.
        title: Title of the paper.
        arxiv: arXiv identifier without version, or ``None``.
        year: Year of the first version of the paper, or ``None``.
        status: ``planned`` (no code yet), ``experimental`` (code and oracle), ``measured`` (also a row in the
            table of measurements) or ``stable`` (also a promise about its files).
        target: ``"module:Symbol"`` of the class that plugs the method into its family; ``None`` while planned.
        needs: The calibration statistics it asks for; empty where no data is needed.
        reference: Full citation where there is no arXiv identifier, or a second paper that belongs to the method.
    """

    name: str
    family: str
    title: str
    arxiv: str | None = None
    year: int | None = None
    status: Status = "planned"
    target: str | None = None
    needs: tuple[str, ...] = ()
    reference: str = ""

    def load(self) -> Any:
        """Imports and returns the object that ``target`` names.

        Raises:
            ValueError: The method is planned and has no code yet.
        """
        if self.target is None:
            raise ValueError(
                f"method {self.name!r} is planned and has no code yet; "
                "`eckart methods --status measured` lists the methods that run"
            )
        module, symbol = self.target.split(":")
        return getattr(importlib.import_module(module), symbol)


# fmt: off
METHODS: tuple[Method, ...] = (
    # linalg
    Method("kronecker-sbl", "linalg", "Bayesian Algorithms for Kronecker-structured Sparse Vector Recovery With Application to IRS-MIMO Channel Estimation", "2307.14719", 2023, "measured", "eckart.linalg.kronecker_sbl:KroneckerSBL"),
    Method("matrix-sqrt", "linalg", "Fast Differentiable Matrix Square Root (and the T-PAMI extension \"... and Inverse Square Root\")", "2201.08663", 2022, "measured", "eckart.linalg.matrix_sqrt:MatrixSqrt"),
    Method("randomized-pivoting", "linalg", "A Unified Perspective on Orthogonalization and Diagonalization (v3+: \"Matrix Factorizations with Uniformly Random Pivoting\")", "2505.02023", 2025, "measured", "eckart.linalg.randomized_pivoting:RandomizedPivoting"),
    Method("rsvddpd", "linalg", "A Robust Scalable Video Surveillance Background Modelling Algorithm", "2109.10680", 2021, "measured", "eckart.linalg.rsvddpd:RSVDDPD"),
    Method("svd-update", "linalg", "Fast Updating Truncated SVD for Representation Learning with Sparse Matrices", "2401.09703", 2024, "measured", "eckart.linalg.svd_update:SVDUpdate"),
    # compression
    Method("afm-ctr", "compression", "Unified Low-rank Compression Framework for Click-through Rate Prediction (Atomic Feature Mimicking)", "2405.18146", 2024, "measured", "eckart.compression.afm_ctr:AFM", needs=("gram", "mean")),
    Method("asvd", "compression", "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models", "2312.05821", 2023, "measured", "eckart.compression.asvd:ASVD", needs=("absmean",)),
    Method("compactifai", "compression", "Extreme Compression of Large Language Models using Quantum-Inspired Tensor Networks", "2401.14109", 2024, "measured", "eckart.compression.compactifai:CompactifAI"),
    Method("cospadi", "compression", "Compressing LLMs via Calibration-Guided Sparse Dictionary Learning", "2509.22075", 2025, "measured", "eckart.compression.cospadi:CoSpaDi", needs=("gram",)),
    Method("dsformer", "compression", "Effective Compression of Text-Transformers by Dense-Sparse Weight Factorization", "2312.13211", 2023, "measured", "eckart.compression.dsformer:DSFormer"),
    Method("emloc", "compression", "Emulator-based Memory-efficient Fine-tuning with LoRA Correction", "2506.12015", 2025, "measured", "eckart.compression.emloc:EMLoC", needs=("gram",)),
    Method("fwsvd", "compression", "Language model compression with weighted low-rank factorization", "2207.00112", 2022, "measured", "eckart.compression.fwsvd:FWSVD", needs=("fisher",)),
    Method("lorap", "compression", "Transformer Sub-Layers Deserve Differentiated Structured Compression for Large Language Models", "2404.09695", 2024, "measured", "eckart.compression.lorap:LoRAP", needs=("meansquare",)),
    Method("loraprune", "compression", "Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning", "2305.18403", 2023, "measured", "eckart.compression.loraprune:LoRAPrune", needs=("gradients",)),
    Method("mixed-td", "compression", "Efficient Neural Network Accelerator with Layer-Specific Tensor Decomposition", "2306.05021", 2023, "measured", "eckart.compression.mixed_td:MixedTD", needs=("data",)),
    Method("modegpt", "compression", "Modular Decomposition for Large Language Model Compression", "2408.09632", 2024, "measured", "eckart.compression.modegpt:MoDeGPT", needs=("gram", "mean")),
    Method("ones", "compression", "One Student Knows All Experts Know: From Sparse to Dense", "2201.10890", 2022, "measured", "eckart.compression.ones:OneS", needs=("routing",)),
    Method("pifa", "compression", "Pivoting Factorization: A Compact Meta Low-Rank Representation of Sparsity for Efficient Inference in Large Language Models", "2501.19090", 2025, "measured", "eckart.compression.pifa:PIFA", needs=("compressed_gram", "cross_gram")),
    Method("sub-moe", "compression", "Efficient Mixture-of-Expert LLMs Compression via Subspace Expert Merging", "2506.23266", 2025, "measured", "eckart.compression.sub_moe:SubMoE", needs=("routing",)),
    Method("svd", "compression", "The approximation of one matrix by another of lower rank", None, 1936, "measured", "eckart.compression.svd:SVD", reference="C. Eckart and G. Young, Psychometrika 1(3):211-218, 1936, doi:10.1007/BF02288367"),
    Method("svd-llm", "compression", "Truncation-aware Singular Value Decomposition for Large Language Model Compression (and SVD-LLM V2)", "2403.07378", 2024, "measured", "eckart.compression.svd_llm:SVDLLM", needs=("gram",), reference="SVD-LLM V2: Optimizing Singular Value Truncation for Large Language Model Compression, arXiv:2503.12340 (2025)"),
    Method("welore", "compression", "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients", "2407.11239", 2024, "measured", "eckart.compression.welore:WeLoRe"),
    # adapters
    Method("ac-lora", "adapters", "Auto Component LoRA for Personalized Artistic Style Image Generation", "2504.02231", 2025, "measured", "eckart.adapters.ac_lora:ACLoRA"),
    Method("adalora", "adapters", "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", "2303.10512", 2023, "measured", "eckart.adapters.adalora:AdaLoRA"),
    Method("ba-lora", "adapters", "Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large Language Models", "2408.04556", 2024, "measured", "eckart.adapters.ba_lora:BALoRA"),
    Method("bilora", "adapters", "A Bi-level Optimization Framework for Overfitting-Resilient Low-Rank Adaptation of Large Pre-trained Models", "2403.13037", 2024, "measured", "eckart.adapters.bilora:BiLoRA"),
    Method("bone", "adapters", "Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models (later: Block-Affine Adaptation; DiSHA; MiSS)", "2409.15371", 2024, "measured", "eckart.adapters.bone:Bone"),
    Method("ce-ssl", "adapters", "Computation-Efficient Semi-Supervised Learning for ECG-based Cardiovascular Diseases Detection", "2406.14377", 2024, "measured", "eckart.adapters.ce_ssl:CESSL"),
    Method("clip-svd", "adapters", "Singular Value Few-shot Adaptation of Vision-Language Models", "2509.03740", 2025, "measured", "eckart.adapters.clip_svd:CLIPSVD"),
    Method("compacter", "adapters", "Efficient Low-Rank Hypercomplex Adapter Layers", "2106.04647", 2021, "measured", "eckart.adapters.compacter:Compacter"),
    Method("corda", "adapters", "Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware PEFT", "2406.05223", 2024, "measured", "eckart.adapters.corda:CorDA", needs=("gram",)),
    Method("dsee", "adapters", "Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models", "2111.00160", 2021, "measured", "eckart.adapters.dsee:DSEE"),
    Method("dylora", "adapters", "Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation", "2210.07558", 2022, "measured", "eckart.adapters.dylora:DyLoRA"),
    Method("edora", "adapters", "Efficient Weight-Decomposed Low-Rank Adaptation via Singular Value Decomposition", "2501.12067", 2025, "measured", "eckart.adapters.edora:EDoRA"),
    Method("effort", "adapters", "Efficient Orthogonal Modeling / Orthogonal Subspace Decomposition for Generalizable AI-Generated Image Detection", "2411.15633", 2024, "measured", "eckart.adapters.effort:Effort"),
    Method("eva", "adapters", "One Initialization to Rule them All - Fine-tuning via Explained Variance Adaptation", "2410.07170", 2024, "measured", "eckart.adapters.eva:EVA", needs=("gram", "mean")),
    Method("explora", "adapters", "Parameter-Efficient Extended Pre-Training to Adapt Vision Transformers under Domain Shifts", "2406.10973", 2024, "measured", "eckart.adapters.explora:ExPLoRA"),
    Method("flora", "adapters", "Low-Rank Core Space for N-dimension", "2405.14739", 2024, "measured", "eckart.adapters.flora:FLoRA"),
    Method("goat", "adapters", "Make LoRA Great Again - Boosting LoRA with Adaptive Singular Values and Mixture-of-Experts Optimization Alignment", "2502.16894", 2025, "measured", "eckart.adapters.goat:GOAT"),
    Method("hydra", "adapters", "Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning", "2309.06922", 2023, "measured", "eckart.adapters.hydra:Hydra"),
    Method("kasa", "adapters", "Knowledge-Aware Singular-Value Adaptation of Large Language Models", "2412.06071", 2024, "measured", "eckart.adapters.kasa:KaSA"),
    Method("lamda", "adapters", "Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation", "2406.12832", 2024, "measured", "eckart.adapters.lamda:LaMDA"),
    Method("loldu", "adapters", "Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning", "2410.13618", 2024, "measured", "eckart.adapters.loldu:LoLDU"),
    Method("lora", "adapters", "Low-Rank Adaptation of Large Language Models", "2106.09685", 2021, "experimental", "eckart.adapters.lora:LoRA"),
    Method("lora-xs", "adapters", "Low-Rank Adaptation with Extremely Small Number of Parameters", "2405.17604", 2024, "measured", "eckart.adapters.lora_xs:LoRAXS"),
    Method("msplora", "adapters", "A Multi-Scale Pyramid Low-Rank Adaptation for Efficient Model Fine-Tuning", "2503.21838", 2025, "measured", "eckart.adapters.msplora:MSPLoRA"),
    Method("nlora", "adapters", "Nyström-Initiated Low-Rank Adaptation for Large Language Models", "2502.14482", 2025, "measured", "eckart.adapters.nlora:NLoRA"),
    Method("nola", "adapters", "Networks as Linear Combination of Low Rank Random Basis (title of later versions: Compressing LoRA using Linear Combination of Random Basis)", "2310.02556", 2023, "measured", "eckart.adapters.nola:NOLA"),
    Method("nora", "adapters", "Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models", "2408.10280", 2024, "measured", "eckart.adapters.nora:NoRA", needs=("absmean",)),
    Method("paca", "adapters", "Partial Connection Adaptation for Efficient Fine-Tuning", "2503.01905", 2025, "measured", "eckart.adapters.paca:PaCA"),
    Method("petalface", "adapters", "Parameter Efficient Transfer Learning for Low-resolution Face Recognition", "2412.07771", 2024, "measured", "eckart.adapters.petalface:PETALface"),
    Method("pissa", "adapters", "Principal Singular Values and Singular Vectors Adaptation of Large Language Models", "2404.02948", 2024, "measured", "eckart.adapters.pissa:PiSSA"),
    Method("salt", "adapters", "Singular Value Adaptation with Low-Rank Transformation", "2503.16055", 2025, "measured", "eckart.adapters.salt:SALT"),
    Method("soka", "adapters", "Singular Value Decomposition on Kronecker Adaptation for Large Language Model", "2506.15251", 2025, "measured", "eckart.adapters.soka:SoKA"),
    Method("soma", "adapters", "Singular Value Decomposed Minor Components Adaptation for Domain Generalizable Representation Learning", "2412.04077", 2024, "measured", "eckart.adapters.soma:SoMA"),
    Method("sorsa", "adapters", "Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models", "2409.00055", 2024, "measured", "eckart.adapters.sorsa:SORSA"),
    Method("spectral-adapter", "adapters", "Fine-Tuning in Spectral Space", "2405.13952", 2024, "measured", "eckart.adapters.spectral_adapter:SpectralAdapter"),
    Method("spectral-ft", "adapters", "Spectral-Aware Low-Rank Adaptation for Speaker Verification", "2501.03829", 2025, "measured", "eckart.adapters.spectral_ft:SpectralFT"),
    Method("svfit", "adapters", "Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values", "2409.05926", 2024, "measured", "eckart.adapters.svfit:SVFit"),
    Method("tlora", "adapters", "Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image Models", "2501.08727", 2025, "measured", "eckart.adapters.tlora:TLoRA"),
    # optim
    Method("coap", "optim", "Memory-Efficient Training with Correlation-Aware Gradient Projection", "2412.00071", 2024, "measured", "eckart.optim.coap:COAP"),
    Method("dct-adamw", "optim", "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models", "2505.17967", 2025, "measured", "eckart.optim.dct_adamw:DCTProjection"),
    Method("fira", "optim", "Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", "2410.01623", 2024, "measured", "eckart.optim.fira:Fira"),
    Method("galore", "optim", "Memory-Efficient LLM Training by Gradient Low-Rank Projection", "2403.03507", 2024, "measured", "eckart.optim.galore:GaLore"),
    Method("galore-plus", "optim", "Boosting Low-Rank Adaptation for LLMs with Cross-Head Projection", "2412.19820", 2024, "measured", "eckart.optim.galore_plus:GaLorePlus"),
    Method("gwt", "optim", "Breaking Memory Limits: Gradient Wavelet Transform Enhances LLMs Training", "2501.07237", 2025, "measured", "eckart.optim.gwt:GWT"),
    Method("lift", "optim", "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused Supervised Fine-Tuning", "2506.00772", 2025, "measured", "eckart.optim.lift:LIFT"),
    Method("online-subspace-descent", "optim", "Memory-Efficient LLM Training with Online Subspace Descent", "2408.12857", 2024, "measured", "eckart.optim.online_subspace_descent:OnlineSubspace"),
    Method("q-galore", "optim", "Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients", "2407.08296", 2024, "measured", "eckart.optim.q_galore:QGaLore"),
    # pretraining
    Method("kind", "pretraining", "Knowledge Integration and Diversion in Diffusion Models", "2408.07337", 2024),
    Method("lost", "pretraining", "Low-rank and Sparse Pre-training for Large Language Models", "2508.02668", 2025),
    Method("maestro", "pretraining", "Uncovering Low-Rank Structures via Trainable Decomposition", "2308.14929", 2023),
    Method("sltrain", "pretraining", "a sparse plus low-rank approach for parameter and memory efficient pretraining", "2406.02214", 2024),
    Method("svd-init", "pretraining", "Singular Value Decomposition and Neural Networks", "1906.11755", 2019, "measured", "eckart.pretraining.svd_init:SVDInit", needs=("data",)),
    # quantization
    Method("discquant", "quantization", "DiscQuant: A Quantization Method for Neural Networks Inspired by Discrepancy Theory", "2501.06417", 2025),
    Method("efficientdm", "quantization", "EfficientDM: Efficient Quantization-Aware Fine-Tuning of Low-Bit Diffusion Models", "2310.03270", 2023),
    Method("lr-qat", "quantization", "Low-Rank Quantization-Aware Training for LLMs", "2406.06385", 2024),
    Method("oneqllm", "quantization", "One QuantLLM for ALL: Fine-tuning Quantized LLMs Once for Efficient Deployments", "2405.20202", 2024),
    Method("qllm", "quantization", "QLLM: Accurate and Efficient Low-Bitwidth Quantization for Large Language Models", "2310.08041", 2023),
    Method("quad", "quantization", "QUAD: Quantization and Parameter-Efficient Tuning of LLM with Activation Decomposition", "2503.19353", 2025),
    Method("qvgen", "quantization", "QVGen: Pushing the Limit of Quantized Video Generative Models", "2505.11497", 2025),
    Method("svdquant", "quantization", "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models", "2411.05007", 2024),
    # serving
    Method("flashsvd", "serving", "Memory-Efficient Inference with Streaming for Low-Rank Models", "2508.01506", 2025),
    Method("r-sparse", "serving", "Rank-Aware Activation Sparsity for Efficient LLM Inference", "2504.19449", 2025),
    Method("sla", "serving", "Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention", "2509.24006", 2025),
    Method("think", "serving", "Thinner Key Cache by Query-Driven Pruning", "2407.21018", 2024),
    Method("xkv", "serving", "Cross-Layer SVD for KV-Cache Compression", "2503.18893", 2025),
    # merging
    Method("copa-merging", "merging", "Parameter Efficient Merging for Multimodal Large Language Models with Complementary Parameter Adaptation", "2502.17159", 2025),
    Method("cycleqd", "merging", "Agent Skill Acquisition for Large Language Models via CycleQD", "2410.14735", 2024),
    Method("long-to-short", "merging", "Unlocking Efficient Long-to-Short LLM Reasoning with Model Merging", "2503.20641", 2025),
    Method("multi-source-svd", "merging", "Efficient Multi-Source Knowledge Transfer by Model Merging", "2508.19353", 2025),
    Method("rmm", "merging", "Towards Reversible Model Merging For Low-rank Weights", "2510.14163", 2025),
    # federated
    Method("dp-lora", "federated", "Differentially Private Low-Rank Adaptation of Large Language Model Using Federated Learning", "2312.17493", 2023),
    Method("fedsvd", "federated", "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", "2505.12805", 2025),
    # analysis
    Method("gradient-spectra", "analysis", "How Instruction and Reasoning Data shape Post-Training: Data Quality through the Lens of Layer-wise Gradients", "2504.10766", 2025, "measured", "eckart.analysis.gradient_spectra:GradientSpectra", needs=("data", "labels")),
    Method("intruder-dimensions", "analysis", "LoRA vs Full Fine-tuning: An Illusion of Equivalence", "2410.21228", 2024, "experimental", "eckart.analysis.intruder_dimensions:IntruderDimensions", needs=("base",)),
    Method("locally-linear", "analysis", "Large Language Models are Locally Linear Mappings (repo title: Equivalent Linear Mappings of Large Language Models)", "2505.24293", 2025, "measured", "eckart.analysis.locally_linear:LocallyLinear", needs=("data",)),
    Method("lora-limits", "analysis", "Computational Limits of Low-Rank Adaptation (LoRA) for Transformer-Based Models", "2406.03136", 2024, "measured", "eckart.analysis.lora_limits:LoRALimits", needs=("data",)),
    Method("matrix-nuclear-norm", "analysis", "Large Language Model Evaluation via Matrix Nuclear-Norm", "2410.10672", 2024, "measured", "eckart.analysis.matrix_nuclear_norm:MatrixNuclearNorm", needs=("data",)),
    Method("talking-heads", "analysis", "Understanding Inter-layer Communication in Transformer Language Models", "2406.09519", 2024, "measured", "eckart.analysis.talking_heads:TalkingHeads"),
    # alignment
    Method("fwd-prompt", "alignment", "Beyond Anti-Forgetting: Multimodal Continual Instruction Tuning with Positive Forward Transfer", "2401.09181", 2024),
    Method("jacobian-nuclear-norm", "alignment", "Nuclear Norm Regularization for Deep Learning", "2405.14544", 2024, "measured", "eckart.alignment.jacobian_nuclear_norm:JacobianNuclearNorm"),
    Method("loku", "alignment", "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs", "2408.06621", 2024),
    Method("panacea", "alignment", "Pareto Alignment via Preference Adaptation for LLMs", "2402.02030", 2024),
    Method("sculpting-subspaces", "alignment", "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", "2504.07097", 2025),
    # diffusion
    Method("alignprop", "diffusion", "Aligning Text-to-Image Diffusion Models with Reward Backpropagation", "2310.03739", 2023),
    Method("ctrl-adapter", "diffusion", "An Efficient and Versatile Framework for Adapting Diverse Controls to Any Diffusion Model", "2404.09967", 2024),
    Method("latent-svd-edit", "diffusion", "Exploring the latent space of diffusion models directly through singular value decomposition", "2502.02225", 2025),
    Method("lora-watermark", "diffusion", "An Efficient Watermarking Method for Latent Diffusion Models via Low-Rank Adaptation (v2 adds \"and Dynamic Loss Weighting\")", "2410.20202", 2024),
    Method("tcfg", "diffusion", "Tangential Damping Classifier-free Guidance", "2503.18137", 2025),
    Method("vividpose", "diffusion", "Advancing Stable Video Diffusion for Realistic Human Image Animation", "2405.18156", 2024),
    # fields
    Method("aml-clustering", "fields", "Combating Financial Crimes with Unsupervised Learning Techniques: Clustering and Dimensionality Reduction for Anti-Money Laundering", "2403.00777", 2024),
    Method("beam-codebook", "fields", "Massive MIMO Beam Management in Sub-6 GHz 5G NR", "2204.06064", 2022),
    Method("dp-quantum-rec", "fields", "Differential Privacy of Quantum and Quantum-Inspired-Classical Recommendation Algorithms", "2502.04758", 2025),
    Method("hir-diff", "fields", "Unsupervised Hyperspectral Image Restoration Via Improved Diffusion Models", "2402.15865", 2024),
    Method("hola", "fields", "Zero-Shot HOI Detection with Low-Rank Decomposed VLM Feature Adaptation", "2507.15542", 2025),
    Method("lightgcl", "fields", "Simple Yet Effective Graph Contrastive Learning for Recommendation", "2302.08191", 2023),
    Method("my3dgen", "fields", "Building Lightweight Personalized 3D Generative Model (later title: A Scalable Personalized 3D Generative Model)", "2307.05468", 2023),
    Method("rl-svd", "fields", "Representations and Exploration for Deep Reinforcement Learning using Singular Value Decomposition", "2305.00654", 2023),
    Method("singular-pinn", "fields", "Deep Learning solutions to singular ordinary differential equations: from special functions to spherical accretion", "2409.20150", 2024),
    Method("speech-align", "fields", "Transferable speech-to-text large language model alignment module", "2406.13357", 2024),
    Method("spodify", "fields", "A Mesh Is Worth 512 Numbers: Spectral-domain Diffusion Modeling for High-dimension Shape Generation", "2503.06485", 2025),
    Method("svdc", "fields", "Consistent Direct Time-of-Flight Video Depth Completion with Frequency Selective Fusion", "2503.01257", 2025),
    Method("svdformer", "fields", "Complementing Point Cloud via Self-view Augmentation and Self-structure Dual-generator", "2307.08492", 2023),
    Method("svdna", "fields", "Noise transfer for unsupervised domain adaptation of retinal OCT images", "2209.08097", 2022),
    Method("vlora", "fields", "Visual Perception by Large Language Model's Weights", "2405.20339", 2024),
)
# fmt: on

FAMILIES: tuple[str, ...] = tuple(dict.fromkeys(method.family for method in METHODS))
STATUSES: tuple[Status, ...] = get_args(Status)
_BY_NAME = {method.name: method for method in METHODS}


def get(name: str, family: str | None = None) -> Method:
    """Finds one method; capitals and underscores are forgiven.

    Args:
        name: A name in the catalog.
        family: Where given, only methods of this family are known.

    Returns:
        Its row.

    Raises:
        UnknownMethodError: There is none; the message names the nearest names.

    Example:
        >>> get("SVD_LLM").arxiv
        '2403.07378'
    """
    key = name.strip().lower().replace("_", "-")
    method = _BY_NAME.get(key)
    if method is not None and family in (None, method.family):
        return method
    if method is not None:
        raise UnknownMethodError(
            f"method {key!r} belongs to {method.family}, not to {family}; "
            f"`eckart methods --family {family}` lists those"
        )
    candidates = [row.name for row in select(family=family)]
    near = difflib.get_close_matches(key, candidates, n=3, cutoff=0.5)
    remedy = f"did you mean {' or '.join(near)}?" if near else "`eckart methods` lists all"
    raise UnknownMethodError(f"unknown method {name!r}; {remedy}")


def name_of(kind: type) -> str | None:
    """The name of the method that a class plugs in.

    Args:
        kind: The class of a method.

    Returns:
        The name in the catalog; None for a class that no row names.

    Example:
        >>> name_of(get("pissa").load()), name_of(int)
        ('pissa', None)
    """
    target = f"{kind.__module__}:{kind.__name__}"
    return next((method.name for method in METHODS if method.target == target), None)


def select(family: str | None = None, status: str | None = None) -> tuple[Method, ...]:
    """Lists the methods of one family, one status, or both, in the order of the catalog.

    Args:
        family: One of ``FAMILIES``; ``None`` for all.
        status: One of ``STATUSES``; ``None`` for all.

    Returns:
        The rows.

    Raises:
        ValueError: No such family or status; the message names those there are.

    Example:
        >>> [method.name for method in select(family="federated")]
        ['dp-lora', 'fedsvd']
    """
    for kind, value, known in (("family", family, FAMILIES), ("status", status, STATUSES)):
        if value is not None and value not in known:
            raise ValueError(f"unknown {kind} {value!r}; choose one of {', '.join(known)}")
    return tuple(row for row in METHODS if family in (None, row.family) and status in (None, row.status))
