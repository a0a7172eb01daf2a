"""Task samplers, and the problems posed on them: a folder for each family.

    few_shot/     N-way K-shot tasks of images, sinusoids; any nn.Module, adapted to each task
    reweighting/  weights for training examples or classes: data cleaning, long-tailed classes
    text/         a regularisation strength for each feature of texts
    synthetic/    problems of the papers, with a known solution or a dense Hessian
    data/         what the families share: downloads, images, random numbers
    fixed.py      a single task, or a fixed set of tasks, as a sampler

To add a sampler, write a class with `sample(index)` in a new file of its family (the protocols of
`metadist.task` say what else it may offer), and add its line below; `check_sampler` tests it. To
add a problem, derive from `metadist.Problem` in a new file and add its line below; test its
hypergradients with `check_hypergradient`. The command line then knows both by their short names.
No family imports another.
"""

if __name__ != "metadist.tasks":
    raise ImportError("import metadist.tasks, not tasks: a bare name may be any module")

from metadist.checks.sampler import SamplerError, SamplerReport, check_sampler
from metadist.tasks.data.random import Random
from metadist.tasks.data.sources import FetchError, fetch
from metadist.tasks.few_shot.cifar import CIFARFS, FC100
from metadist.tasks.few_shot.class_splits import read_splits
from metadist.tasks.few_shot.dataset import FewShotDataset
from metadist.tasks.few_shot.episodes import ClassImages, EpisodeSampler
from metadist.tasks.few_shot.folder import ImageFolder
from metadist.tasks.few_shot.glyphs import Glyphs
from metadist.tasks.few_shot.omniglot import Omniglot
from metadist.tasks.few_shot.problem import FewShotProblem
from metadist.tasks.few_shot.sinusoid import Sinusoid
from metadist.tasks.fixed import FixedTasks
from metadist.tasks.reweighting.corrupted_images import CorruptedImages
from metadist.tasks.reweighting.long_tail import LongTail
from metadist.tasks.reweighting.problem import (
    ClassWeights,
    ExampleWeighting,
    HyperCleaning,
    LinearClassifier,
    LossWeighting,
)
from metadist.tasks.synthetic.lancbio import LancBiOData, LancBiOSynthetic
from metadist.tasks.synthetic.quadratics import QuadraticData, Quadratics
from metadist.tasks.synthetic.toys import (
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
from metadist.tasks.text.features import TextFeatures
from metadist.tasks.text.regularisation import TextRegularisation

__all__ = [
    "CIFARFS",
    "FC100",
    "AmigoToy",
    "ClassImages",
    "ClassWeights",
    "Coreset",
    "CorruptedImages",
    "Degenerate",
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
    "Random",
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
