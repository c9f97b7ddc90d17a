"""ProdLDA on 20 Newsgroups with the authors' settings (Srivastava & Sutton, arXiv:1703.01488): perplexity and topics.

    python examples/prodlda.py --seeds 0 1 2 --output runs/prodlda.json
    python examples/prodlda.py --smoke                            a few seconds, on documents made up here

50 topics, hidden layers of 100 and 100, batches of 200, Adam with beta_1 = 0.99 and rate 0.002, dropout 0.6, 80 epochs
through the 11,258 training documents, as in the authors' code (github.com/akashgit/autoencoding_vi_for_topic_models).

Perplexity is exp(-log p(x) per word) of the test documents, log p(x) bounded from below by the ELBO or, closer, by
importance sampling; its mean over documents (the authors' way) weights each document alike, that over words each word.
That of the words' shares in all training documents, the same for every document, is printed beside it.
Coherence is the normalised pointwise mutual information of pairs of a topic's 10 top words, by the documents that hold
them, -1 for a pair that no document holds.
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array, vstack

import pyro_vae as pv

Documents = Any  # csr_array


def main() -> None:
    """Train with each seed, score, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-topics", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--dropout", type=float, default=0.6)
    parser.add_argument(
        "--bayesian", action="store_true", help="topics are latent, with a prior N(0, 1) on each weight"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num-particles", type=int, default=100, help="importance samples per document")
    parser.add_argument("--root", help="folder with the data")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--smoke", action="store_true", help="two epochs on documents of a few made-up topics")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.num_topics, args.num_particles = 2, 4, 5
    train, test, vocab = made_up() if args.smoke else newsgroups(args.root)
    shares = unigram(train, test)
    print(
        f"the same word shares for every document: perplexity {perplexity_of_documents(shares, test):.4g} over "
        f"documents, {perplexity_of_words(shares, test):.4g} over words"
    )
    results = [run(train, test, vocab, seed, args) for seed in args.seeds]
    for name in ("perplexity_of_documents", "perplexity_of_words", "coherence_test"):
        values = [result[name] for result in results]
        print(f"{name}: {np.mean(values):.4g} over {len(values)} seeds, from {min(values):.4g} to {max(values):.4g}")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1))


def run(train: Documents, test: Documents, vocab: tuple[str, ...], seed: int, args: argparse.Namespace) -> Any:
    """Train a model, and what it scores."""
    torch.manual_seed(seed)
    lda = pv.ProdLDA(len(vocab), args.num_topics, (100, 100), dropout=args.dropout, bayesian=args.bayesian)
    started = time.perf_counter()
    trained = pv.fit(
        lda,
        train,
        test=test,
        objective=pv.SGVB(estimator="B"),
        optimizer=functools.partial(torch.optim.Adam, lr=0.002, betas=(0.99, 0.999)),
        batch_size=200,
        epochs=args.epochs,
        evaluate_every=10 * train.shape[0],
        seed=seed,
    )
    seconds = time.perf_counter() - started
    bound = pv.log_marginal(lda, test, num_particles=1, seed=seed)  # one draw's log weight: the ELBO in mean
    score = pv.log_marginal(lda, test, num_particles=args.num_particles, seed=seed)
    words = lda.topics.topk(10).indices.numpy()
    result = {
        "seed": seed,
        "seconds": seconds,
        "test_bound": trained.history[-1]["test_bound"],
        "log_marginal": score.mean,
        "perplexity_of_documents": perplexity_of_documents(bound.values, test),
        "perplexity_of_words": perplexity_of_words(bound.values, test),
        "perplexity_of_documents_by_importance": perplexity_of_documents(score.values, test),
        "perplexity_of_words_by_importance": perplexity_of_words(score.values, test),
        "coherence_train": coherence(train, words),
        "coherence_test": coherence(test, words),
        "different_words": len(np.unique(words)) / words.size,
        "topics": lda.top_words(vocab),
    }
    for topic in result["topics"]:
        print(*topic)
    print({name: value for name, value in result.items() if name != "topics"})
    print(f"seed {seed}: test bound {result['test_bound']:.2f} nats per document, {seconds:.0f} s of training")
    return result


def unigram(train: Documents, test: Documents) -> torch.Tensor:
    """Log densities of the test documents under the words' shares in training, with 0.1 added to each count."""
    counts = train.sum(0) + 0.1
    return torch.from_numpy(test @ np.log(counts / counts.sum()))


def perplexity_of_documents(log_p: torch.Tensor, documents: Documents) -> float:
    """Exp of the mean over documents of -log p(x) per word."""
    return float(np.exp(-np.mean(log_p.double().numpy() / documents.sum(1))))


def perplexity_of_words(log_p: torch.Tensor, documents: Documents) -> float:
    """Exp of -log p(x) of all documents per word of them all."""
    return float(np.exp(-log_p.double().numpy().sum() / documents.sum()))


def coherence(documents: Documents, topics: Any) -> float:
    """Mean NPMI of the pairs of words (topics, n) that are a topic's."""
    words, place = np.unique(topics, return_inverse=True)
    holds = (documents[:, words] > 0).astype(np.float64)
    together = (holds.T @ holds).toarray() / documents.shape[0]  # shares of the documents, (words, words)
    alone = together.diagonal()
    with np.errstate(divide="ignore", invalid="ignore"):
        npmi = np.log(together / np.outer(alone, alone)) / -np.log(together)
    npmi[together == 0] = -1.0
    first, second = np.triu_indices(topics.shape[1], 1)
    place = place.reshape(topics.shape)
    return float(npmi[place[:, first], place[:, second]].mean())


def newsgroups(root: str | None) -> tuple[Documents, Documents, tuple[str, ...]]:
    """20 Newsgroups as it was split: no validation part."""
    data = pv.load_dataset("20newsgroups", root=root)
    assert data.vocab is not None
    return vstack([data.train, data.valid]).tocsr(), data.test, data.vocab


def made_up() -> tuple[Documents, Documents, tuple[str, ...]]:
    """Documents of 40 words, each from one of four topics with ten words of its own."""
    rng = np.random.default_rng(0)
    topics = np.kron(np.eye(4), np.full(10, 0.09)) + 0.1 / 40
    counts = csr_array(rng.multinomial(40, topics[rng.integers(4, size=1200)]))
    return counts[:1000], counts[1000:], tuple(f"{topic}{word}" for topic in "abcd" for word in range(10))


if __name__ == "__main__":
    main()
