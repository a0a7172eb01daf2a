"""Language models: weights of sources and examples of text, learned for a validation text."""

from typing import TYPE_CHECKING

from metadist.exports import lazy

if TYPE_CHECKING:
    from metadist.tasks.language.hugging_face import HuggingFace as HuggingFace
    from metadist.tasks.language.problem import LanguageModelProblem as LanguageModelProblem
    from metadist.tasks.language.retraining import Retrained as Retrained
    from metadist.tasks.language.retraining import retrain as retrain
    from metadist.tasks.language.sources import TokenSources as TokenSources
    from metadist.tasks.language.weights import ExampleWeights as ExampleWeights
    from metadist.tasks.language.weights import Rater as Rater
    from metadist.tasks.language.weights import SourceWeights as SourceWeights
    from metadist.tasks.language.weights import Weights as Weights

if not TYPE_CHECKING:  # so that type checkers believe in no other names
    __all__, __getattr__, __dir__ = lazy(__name__)
