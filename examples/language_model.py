"""Learn how much each source of text should count, so that a target text is predicted well."""

import random
import tempfile
from pathlib import Path

from metadist import AdamW, OuterOptimizer, Trainer
from metadist.algorithms import F2SA
from metadist.tasks import HuggingFace, LanguageModelProblem, SourceWeights, TokenSources

# A small Llama with random weights, so that nothing is fetched. For a trained one write
# HuggingFace("gpt2", lora={"r": 8}, precision="bf16", rematerialise=True), tokenizer="gpt2" and
# length=1024 below; to run on a cluster, Trainer(..., executor=RayExecutor()).
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 32,
}


def write(file: Path, words: str, seed: int) -> Path:
    """A text of these words in random order."""
    draws = random.Random(seed)
    file.write_text(" ".join(draws.choice(words.split()) for _ in range(3000)))
    return file


def main(folder: str, num_steps: int = 60) -> dict[str, float]:
    """The share of each source after training; a minute on one core."""
    root = Path(folder)
    news = write(root / "news.txt", "the cat sat on a mat and the dog saw it", seed=0)
    web = write(root / "web.txt", "xq zzk wvv qqj kkp vxw zqx jjk wqz pkv", seed=1)
    target = write(root / "target.txt", "the dog sat on a cat and the mat saw it", seed=2)
    data = TokenSources.from_text(
        {"news": news, "web": web},
        validation=target,
        tokenizer="bytes",
        length=32,
        folder=root / "tokens",
    )
    model = HuggingFace(LLAMA, lora=None)
    problem = LanguageModelProblem(model, SourceWeights(data.sources, floor=0.01), micro_batch=8)
    # The moments of AdamW go on from step to step, since a step has one inner step; weight decay
    # would be no part of the loss that the hypergradient is of.
    steps = AdamW(lr=2e-3, weight_decay=0.0, clip_norm=1.0, carry=True)
    trainer = Trainer(
        problem,
        data,
        F2SA(inner_steps=1, inner_optimizer=steps, lam=10.0),
        outer_optimizer=OuterOptimizer("adam", lr=5e-2),
        batch_size=16,
        meta_batch_size=2,  # two inner models, which draw mini-batches of their own
        run_dir=str(root / "run"),
    )
    trainer.fit(num_steps)
    shares = problem.source_weights(trainer.outer)
    print({name: round(share, 3) for name, share in shares.items()})
    problem.save_pretrained(trainer.inner(0), root / "model")
    return shares


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(temporary)
