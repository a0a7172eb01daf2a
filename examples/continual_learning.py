"""Learn task after task without forgetting: what depends on the task is learned on a memory."""

from metadist import OuterOptimizer, Trainer
from metadist.algorithms import BOME
from metadist.tasks import ContextualNetwork, ContinualLearning, JudgeAfterEachTask, PermutedImages


def main(num_tasks: int = 5, per_task: int = 250) -> dict[str, float]:
    """Accuracy on all tasks after the last, and how much was forgotten; seconds on one core."""
    # Digits of 8 x 8 from scikit-learn, whose pixels every task has in another order.
    # `metadist data fetch mnist` and PermutedImages("mnist") do the same for MNIST.
    stream = PermutedImages("digits", num_tasks=num_tasks, per_task=per_task, num_test=400)
    network = ContextualNetwork(64, width=100, num_tasks=num_tasks)
    trainer = Trainer(
        ContinualLearning(network),
        stream,
        BOME(inner_steps=1, inner_lr=0.1, y_lr=0.1),
        outer_optimizer=OuterOptimizer("sgd", lr=0.1),
    )
    judge = JudgeAfterEachTask(trainer)
    trainer.fit(stream.num_steps, judge)
    metrics = judge.matrix.metrics()
    for name, value in metrics.items():
        print(f"{name}: {value:.3f}")
    return metrics


if __name__ == "__main__":
    main()
