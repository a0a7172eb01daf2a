"""Search for the cells of a small network on Fashion-MNIST, and train the network that is found."""

from metadist import SGD, OuterOptimizer, Trainer
from metadist.algorithms import MEHA
from metadist.tasks import ArchitectureSearch, ImageData, Supernet, retrain


def main(
    num_steps: int = 1500,
    dataset: str = "fashion_mnist",
    num_images: int = 2000,
    num_test: int = 10000,
    epochs: int = 20,
    run_dir: str = "runs/nas",
) -> float:
    """Test accuracy of the network that is found; about half an hour on one core."""
    data = ImageData(dataset, num_train=num_images, num_val=num_images, num_test=num_test)
    problem = ArchitectureSearch(Supernet(channels=8, cells="NRN", nodes=2), weight_decay=3e-4)
    # Momentum that continues from step to step, clipped gradients and a cosine, as in DARTS.
    steps = SGD(
        lr=0.025, momentum=0.9, clip_norm=5.0, schedule="cosine", num_steps=num_steps, carry=True
    )
    search = MEHA(inner_optimizer=steps, y_lr=0.025, gamma=10.0, c=1.0, c_power=0.0)
    trainer = Trainer(
        problem,
        data,
        search,
        outer_optimizer=OuterOptimizer(
            "adam", lr=3e-4, options={"betas": (0.5, 0.999), "weight_decay": 1e-3}
        ),
        batch_size=64,
        run_dir=run_dir,
    )
    trainer.fit(num_steps)
    cell = problem.genotype(trainer.outer)
    cell.plot(f"{run_dir}/cell.png")
    accuracy = retrain(cell, data, epochs=epochs)
    print(f"test accuracy of the network found: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
