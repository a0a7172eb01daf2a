"""Task samplers, and the problems posed on them: a folder for each family.

    architecture/ the operations in the cells of a convolutional network
    few_shot/     N-way K-shot tasks of images, sinusoids; any nn.Module, adapted to each task
    reweighting/  weights for training examples or classes: data cleaning, long-tailed classes
    language/     weights of the sources and examples that a language model is trained on
    continual/    images that come once, task after task, with a memory of some of them
    text/         a regularisation strength for each feature of texts
    synthetic/    problems of the papers, with a known solution or a dense Hessian
    data/         what the families share: downloads, images, random numbers
    image_sets.py labelled images in memory, as a sampler of one task
    fixed.py      a single task, or a fixed set of tasks, as a sampler
    table.py      the rows of a CSV file or a DataFrame, as a sampler of one task

To add a sampler, write a class with `sample(index)` in a new file of its family (the protocols of
`metadist.task` say what else it may offer), and add its line below; `check_sampler` tests it. To
add a problem, derive from `metadist.Problem` in a new file and add its line below; test its
hypergradients with `check_hypergradient`. The command line then knows both by their short names.
No family imports another.
"""

if __name__ != "metadist.tasks":
    raise ImportError("import metadist.tasks, not tasks: a bare name may be any module")

from typing import TYPE_CHECKING

from metadist.exports import lazy

if TYPE_CHECKING:
    from metadist.checks.sampler import SamplerError as SamplerError
    from metadist.checks.sampler import SamplerReport as SamplerReport
    from metadist.checks.sampler import check_sampler as check_sampler
    from metadist.tasks.architecture.genotype import Genotype as Genotype
    from metadist.tasks.architecture.network import Network as Network
    from metadist.tasks.architecture.problem import ArchitectureSearch as ArchitectureSearch
    from metadist.tasks.architecture.retraining import retrain as retrain
    from metadist.tasks.architecture.supernet import Supernet as Supernet
    from metadist.tasks.continual.accuracies import AccuracyMatrix as AccuracyMatrix
    from metadist.tasks.continual.accuracies import JudgeAfterEachTask as JudgeAfterEachTask
    from metadist.tasks.continual.images import PermutedImages as PermutedImages
    from metadist.tasks.continual.images import SplitGlyphs as SplitGlyphs
    from metadist.tasks.continual.images import SplitImages as SplitImages
    from metadist.tasks.continual.memory import Reservoir as Reservoir
    from metadist.tasks.continual.memory import Ring as Ring
    from metadist.tasks.continual.problem import ContextualNetwork as ContextualNetwork
    from metadist.tasks.continual.problem import ContinualLearning as ContinualLearning
    from metadist.tasks.continual.stream import ImageStream as ImageStream
    from metadist.tasks.continual.stream import Stage as Stage
    from metadist.tasks.data.random import Random as Random
    from metadist.tasks.data.sources import FetchError as FetchError
    from metadist.tasks.data.sources import fetch as fetch
    from metadist.tasks.few_shot.cifar import CIFARFS as CIFARFS
    from metadist.tasks.few_shot.cifar import FC100 as FC100
    from metadist.tasks.few_shot.class_splits import read_splits as read_splits
    from metadist.tasks.few_shot.closed_form import ProtoNet as ProtoNet
    from metadist.tasks.few_shot.closed_form import RidgeHead as RidgeHead
    from metadist.tasks.few_shot.dataset import FewShotDataset as FewShotDataset
    from metadist.tasks.few_shot.episodes import ClassImages as ClassImages
    from metadist.tasks.few_shot.episodes import EpisodeSampler as EpisodeSampler
    from metadist.tasks.few_shot.folder import ImageFolder as ImageFolder
    from metadist.tasks.few_shot.frozen import LinearProbe as LinearProbe
    from metadist.tasks.few_shot.frozen import NearestCentroid as NearestCentroid
    from metadist.tasks.few_shot.glyphs import Glyphs as Glyphs
    from metadist.tasks.few_shot.omniglot import Omniglot as Omniglot
    from metadist.tasks.few_shot.problem import FewShotProblem as FewShotProblem
    from metadist.tasks.few_shot.sinusoid import Sinusoid as Sinusoid
    from metadist.tasks.fixed import FixedTasks as FixedTasks
    from metadist.tasks.fixed import OneTask as OneTask
    from metadist.tasks.image_sets import ImageData as ImageData
    from metadist.tasks.language.hugging_face import HuggingFace as HuggingFace
    from metadist.tasks.language.problem import LanguageModelProblem as LanguageModelProblem
    from metadist.tasks.language.sources import TokenSources as TokenSources
    from metadist.tasks.language.weights import ExampleWeights as ExampleWeights
    from metadist.tasks.language.weights import Rater as Rater
    from metadist.tasks.language.weights import SourceWeights as SourceWeights
    from metadist.tasks.language.weights import Weights as Weights
    from metadist.tasks.reweighting.corrupted_images import CorruptedImages as CorruptedImages
    from metadist.tasks.reweighting.long_tail import LongTail as LongTail
    from metadist.tasks.reweighting.problem import ClassWeights as ClassWeights
    from metadist.tasks.reweighting.problem import ExampleWeighting as ExampleWeighting
    from metadist.tasks.reweighting.problem import HyperCleaning as HyperCleaning
    from metadist.tasks.reweighting.problem import LinearClassifier as LinearClassifier
    from metadist.tasks.reweighting.problem import LossWeighting as LossWeighting
    from metadist.tasks.synthetic.lancbio import LancBiOData as LancBiOData
    from metadist.tasks.synthetic.lancbio import LancBiOMatrixFree as LancBiOMatrixFree
    from metadist.tasks.synthetic.lancbio import LancBiOMatrixFreeData as LancBiOMatrixFreeData
    from metadist.tasks.synthetic.lancbio import LancBiOSynthetic as LancBiOSynthetic
    from metadist.tasks.synthetic.quadratics import QuadraticData as QuadraticData
    from metadist.tasks.synthetic.quadratics import Quadratics as Quadratics
    from metadist.tasks.synthetic.sparse_regression import SparseRegression as SparseRegression
    from metadist.tasks.synthetic.sparse_regression import (
        SparseRegressionData as SparseRegressionData,
    )
    from metadist.tasks.synthetic.toys import AmigoToy as AmigoToy
    from metadist.tasks.synthetic.toys import Coreset as Coreset
    from metadist.tasks.synthetic.toys import Degenerate as Degenerate
    from metadist.tasks.synthetic.toys import Lasso as Lasso
    from metadist.tasks.synthetic.toys import MerelyConvex as MerelyConvex
    from metadist.tasks.synthetic.toys import Minimax as Minimax
    from metadist.tasks.synthetic.toys import NoData as NoData
    from metadist.tasks.synthetic.toys import PBGDToy as PBGDToy
    from metadist.tasks.synthetic.toys import PenaltyToy as PenaltyToy
    from metadist.tasks.synthetic.toys import Sine as Sine
    from metadist.tasks.table import Table as Table
    from metadist.tasks.text.features import TextFeatures as TextFeatures
    from metadist.tasks.text.regularisation import TextRegularisation as TextRegularisation

if not TYPE_CHECKING:  # so that type checkers believe in no other names
    __all__, __getattr__, __dir__ = lazy(__name__)
