"""Your images, in a folder for each class: learn to tell new classes from one image of each."""

import sys

import torch

from metadist import OuterOptimizer, Trainer
from metadist.algorithms import ITD
from metadist.models import Conv4
from metadist.tasks import ImageFolder, ProtoNet


def main(root: str, num_steps: int = 300, n_way: int = 3, num_test_tasks: int = 600) -> float:
    """The accuracy on classes that training never saw; minutes on one core."""
    train = ImageFolder(root, n_way)
    test = ImageFolder(root, n_way, split="test")
    _, channels, size, _ = train.classes.images.shape
    torch.manual_seed(0)  # for the initial weights
    problem = ProtoNet(Conv4(n_way, channels, width=32, image_size=size))
    optimizer = OuterOptimizer("adam", lr=2e-3, schedule="cosine", schedule_steps=num_steps)
    trainer = Trainer(
        problem, train, ITD(inner_steps=1), outer_optimizer=optimizer, meta_batch_size=8
    )
    trainer.fit(num_steps)
    accuracy = trainer.test(test, num_test_tasks).metrics["query_accuracy"]
    print(f"accuracy on new classes: {accuracy}")
    module = trainer.export(test.sample(0))  # plain torch, for the classes of that task
    torch.save(module, "classifier.pt")
    print(f"classifier.pt tells {', '.join(test.classes_of(0))} apart")
    return accuracy.mean


if __name__ == "__main__":
    main(sys.argv[1])
