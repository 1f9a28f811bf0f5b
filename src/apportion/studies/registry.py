"""All 54 systems: where each lives, which paper it is, and whether it is built."""

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from apportion.errors import InputError
from apportion.studies.finding import Finding, Scale
from apportion.studies.workbench import Workbench


@runtime_checkable
class Study(Protocol):
    """A module of ``apportion.studies``: one published system and its claim."""

    CLAIM: str
    BASELINE: str

    def run(self, scale: Scale, seeds: list[int], bench: Workbench) -> Finding:
        """Measure."""
        ...


@dataclass(frozen=True)
class Entry:
    """A published system.

    Attributes:
        slug: file name in its room and in ``studies``.
        room: which budget it is about.
        paper: title and where to find it.
    """

    slug: str
    room: str
    paper: str

    @property
    def built(self) -> bool:
        """Whether its study exists."""
        return importlib.util.find_spec(f"apportion.studies.{self.slug}") is not None

    def study(self) -> Study:
        """Its module.

        Raises:
            InputError: it is not built yet.
        """
        if not self.built:
            ready = ", ".join(entry.slug for entry in SYSTEMS if entry.built)
            raise InputError(f"{self.slug} ({self.paper}) is not built yet; these are: {ready}")
        return importlib.import_module(f"apportion.studies.{self.slug}")


_PAPERS = {
    "features": {
        "mutual_feature_choice": "Adaptive Sparse Allocation: Mutual Choice & Feature Choice SAEs, arXiv 2411.02124",
        "gradient_sae": "Features that Make a Difference: Gradient SAEs, arXiv 2411.10397",
        "attention_output_sae": "Interpreting Attention Layer Outputs with SAEs, arXiv 2406.17759",
        "transcoder_circuits": "Transcoders Find Interpretable LLM Feature Circuits, arXiv 2406.11944",
        "dark_matter": "Decomposing the Dark Matter of Sparse Autoencoders, arXiv 2410.14670",
        "discrete_circuits": "Sparse Autoencoders Enable Scalable Circuit Identification, arXiv 2405.12522",
        "supervised_dictionaries": "Principled Evaluations of SAEs for Interpretability and Control, arXiv 2405.08366",
        "auto_interp": "Automatically Interpreting Millions of Features in LLMs, arXiv 2410.13928",
    },
    "experts": {
        "topk_gate_statistics": "Statistics of top-K gated mixtures of experts",
        "monet": "Monet: mixture of monosemantic experts",
        "comet": "COMET: sparse expert allocation",
    },
    "weights": {
        "gradual_pruning": "To Prune, or Not to Prune, arXiv 1710.01878",
        "progressive_gradient_flow": "Progressive Gradient Flow for N:M Training, arXiv 2402.04744",
        "bdwp": "Efficient N:M Sparse DNN Training: BDWP and SAT, arXiv 2309.13015",
        "flash_llm": "Flash-LLM: Unstructured Sparsity on Tensor Cores, arXiv 2309.10285",
        "squarehead": "Sparse Fine-tuning with SquareHead Distillation, arXiv 2310.06927",
        "dsnot": "Dynamic Sparse No Training, arXiv 2310.08915",
        "sparse_model_soups": "Sparse Model Soups, arXiv 2306.16788",
        "sparse_ift": "Sparse Iso-FLOP Transformations, arXiv 2303.11525",
        "monarch": "Monarch Matrices, arXiv 2204.00595",
        "random_search": "Random Search for Sparse Architecture Search, arXiv 2403.08265",
        "dass": "DASS: Differentiable Architecture Search for Sparse Networks, arXiv 2207.06968",
        "dynamic_sparse_learning": "Dynamic Sparse Learning for Recommendation, arXiv 2402.02855",
        "sparse_unlearning": "Model Sparsity Can Simplify Machine Unlearning, arXiv 2304.04934",
        "fast_sparse_convnets": "Fast Sparse ConvNets, arXiv 1911.09723",
        "quick_selection": "QuickSelection, arXiv 2012.00560",
        "ssvi": "Sparse Subspace Variational Inference, arXiv 2402.11025",
        "lottery_reprogramming": "Reprogramming under Constraints: Lottery Tickets, arXiv 2308.14969",
    },
    "neurons": {
        "lazy_neuron": "The Lazy Neuron Phenomenon: activation sparsity in transformers",
        "sirius": "Sirius: contextual sparsity with correction",
        "chess": "CHESS: channel-wise thresholding and selective sparsification",
        "crate": "CRATE: white-box transformers by sparse rate reduction",
        "superposed_decoding": "Superposed Decoding: several generations from one pass",
    },
    "keys": {
        "shadow_kv": "ShadowKV, arXiv 2410.21465",
        "seer_attention": "SeerAttention, arXiv 2410.13276",
        "matryoshka_kv": "MatryoshkaKV, arXiv 2410.14731",
        "scbench": "SCBench, arXiv 2412.10319",
        "cskv": "CSKV, arXiv 2409.10593",
        "double_sparsity": "Post-Training Sparse Attention with Double Sparsity, arXiv 2408.07092",
        "sea": "SEA: Sparse Linear Attention with Estimated Attention Mask, arXiv 2310.01777",
        "routing_transformer": "Routing Transformer, arXiv 2003.05997",
    },
    "patches": {
        "spark": "SparK: Designing BERT for Convolutional Networks, arXiv 2301.03580",
        "sparseformer": "SparseFormer and Bootstrapping SparseFormers, arXiv 2304.03768 and 2312.01987",
        "flextok": "FlexTok, arXiv 2502.13967",
        "vitok": "ViTok: Learnings from Scaling Visual Tokenizers, arXiv 2501.09755",
        "titok": "TiTok: An Image is Worth 32 Tokens, arXiv 2406.07550",
    },
    "terms": {
        "idf_flops_retriever": "Inference-free Learned Sparse Retrieval with IDF-aware Penalty, arXiv 2411.04403",
    },
    "codes": {
        "latent_quantization": "Disentanglement via Latent Quantization, arXiv 2305.18378",
        "sparsey": "Sparsey: Superposed Episodic and Semantic Memory, arXiv 1710.07829",
        "laplacian_few_shot": "Transductive Few-shot Learning: Clustering is All You Need?, arXiv 2106.09516",
        "g_simclr": "G-SimCLR: Pseudo-label Guided Batches, arXiv 2009.12007",
        "rkhs_augmentation": "Augmentation-based SSL as RKHS Approximation and Regression, arXiv 2306.00788",
        "probabilistic_circuits": "Lossless Compression with Probabilistic Circuits, arXiv 2111.11632",
        "geological_mapping": "Geological Mapping by Stacked Autoencoders and k-means, arXiv 2404.02180",
    },
}

SYSTEMS = [Entry(slug, room, paper) for room, papers in _PAPERS.items() for slug, paper in papers.items()]


def entry(slug: str) -> Entry:
    """The system of that slug.

    Raises:
        InputError: there is none; names the nearest.
    """
    import difflib

    by_slug = {each.slug: each for each in SYSTEMS}
    if slug not in by_slug:
        near = difflib.get_close_matches(slug, by_slug, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`apportion study --list` names all of them"
        raise InputError(f"there is no study {slug!r}: {hint}")
    return by_slug[slug]
