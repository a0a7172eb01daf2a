"""Task samplers, and the problems posed on them."""

if __name__ != "metadist.tasks":
    raise ImportError("import metadist.tasks, not tasks: a bare name may be any module")

from metadist.checks.sampler import SamplerError, SamplerReport, check_sampler
from metadist.tasks.cifar import CIFARFS, FC100
from metadist.tasks.class_splits import read_splits
from metadist.tasks.corrupted_images import CorruptedImages
from metadist.tasks.data_sources import FetchError, fetch
from metadist.tasks.dataset import FewShotDataset
from metadist.tasks.episodes import ClassImages, Draws, EpisodeSampler
from metadist.tasks.few_shot import FewShotProblem
from metadist.tasks.fixed import FixedTasks
from metadist.tasks.folder import ImageFolder
from metadist.tasks.glyphs import Glyphs
from metadist.tasks.long_tail import LongTail
from metadist.tasks.omniglot import Omniglot
from metadist.tasks.reweighting import (
    ClassWeights,
    ExampleWeighting,
    HyperCleaning,
    LinearClassifier,
    LossWeighting,
)
from metadist.tasks.sinusoid import Sinusoid
from metadist.tasks.synthetic import LancBiOData, LancBiOSynthetic, QuadraticData, Quadratics
from metadist.tasks.text import TextFeatures, TextRegularisation
from metadist.tasks.toys import (
    AmigoToy,
    Coreset,
    Degenerate,
    Lasso,
    MerelyConvex,
    Minimax,
    NoData,
    PBGDToy,
    PenaltyToy,
    Sine,
)

__all__ = [
    "CIFARFS",
    "FC100",
    "AmigoToy",
    "ClassImages",
    "ClassWeights",
    "Coreset",
    "CorruptedImages",
    "Degenerate",
    "Draws",
    "EpisodeSampler",
    "ExampleWeighting",
    "FetchError",
    "FewShotDataset",
    "FewShotProblem",
    "FixedTasks",
    "Glyphs",
    "HyperCleaning",
    "ImageFolder",
    "LancBiOData",
    "LancBiOSynthetic",
    "Lasso",
    "LinearClassifier",
    "LongTail",
    "LossWeighting",
    "MerelyConvex",
    "Minimax",
    "NoData",
    "Omniglot",
    "PBGDToy",
    "PenaltyToy",
    "QuadraticData",
    "Quadratics",
    "SamplerError",
    "SamplerReport",
    "Sine",
    "Sinusoid",
    "TextFeatures",
    "TextRegularisation",
    "check_sampler",
    "fetch",
    "read_splits",
]
