"""Features explained and judged by language models.

*Automatically Interpreting Millions of Features in Large Language Models* (Paulo, Mallen, Juang and Belrose 2024,
arXiv 2410.13928). What is allocated: of the thousands of windows in which a feature
fires, which few an explainer reads, and which others the explanation is tested on; and the judge's tokens, of which
every feature gets the same. The rule is even sampling from quantiles of activation, train and test apart.

| paper | here |
|---|---|
| feature cache, activating windows | `collect_examples`, `Examples` |
| explainer; its prompts | `ChatExplainer`, `TokenShareExplainer` (no model); ``prompts.py`` |
| detection, fuzzing, simulation | `Detection`, `Fuzzing`, `Simulation` |
| surprisal, embedding | `Surprisal`, `Embedding` |
| intervention scoring | `Intervention` |
| a pipeline over millions of latents | `Interpretation`, `interpret_features`, `Records` |
| similarity of SAEs by explanations | `explanation_similarity` |

All prompts are worded anew, and train and test windows are apart by construction, which they are not in the authors'
code.
"""

from apportion.features.auto_interp.asking import Asker, Usage
from apportion.features.auto_interp.choosing import collect_examples
from apportion.features.auto_interp.examples import Examples, ExampleSettings, FeatureExamples
from apportion.features.auto_interp.explain import STYLES, ChatExplainer, Explainer, TokenShareExplainer
from apportion.features.auto_interp.intervention import Intervention, InterventionSettings, tune_strength
from apportion.features.auto_interp.prompts import Explanation
from apportion.features.auto_interp.records import Records, read_results
from apportion.features.auto_interp.run import (
    Estimate,
    Interpretation,
    JudgeUnavailableError,
    Prices,
    Summary,
    fingerprint_of,
    interpret_features,
)
from apportion.features.auto_interp.scorers import Detection, Embedding, Fuzzing, Scorer, Simulation, Surprisal
from apportion.features.auto_interp.scores import Score, auroc, summarise
from apportion.features.auto_interp.similarity import ExplanationSimilarity, explanation_similarity
from apportion.features.auto_interp.windows import Example, mark, unmark

__all__ = [
    "STYLES",
    "Asker",
    "ChatExplainer",
    "Detection",
    "Embedding",
    "Estimate",
    "Example",
    "ExampleSettings",
    "Examples",
    "Explainer",
    "Explanation",
    "ExplanationSimilarity",
    "FeatureExamples",
    "Fuzzing",
    "Interpretation",
    "Intervention",
    "InterventionSettings",
    "JudgeUnavailableError",
    "Prices",
    "Records",
    "Score",
    "Scorer",
    "Simulation",
    "Summary",
    "Surprisal",
    "TokenShareExplainer",
    "Usage",
    "auroc",
    "collect_examples",
    "explanation_similarity",
    "fingerprint_of",
    "interpret_features",
    "mark",
    "read_results",
    "summarise",
    "tune_strength",
    "unmark",
]
