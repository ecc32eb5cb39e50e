"""Reading the output matrix through biased logits, and the classifiers that bias a few labels for good."""

from collections.abc import Sequence

import numpy as np

from spider_sense.extraction.simulator.traffic import Request, Stream

__all__ = ["classifier", "sweep"]

_START = 1.8e9


def sweep(
    name: str, vocabulary: int, requests: int, seed: int, *, biased: int = 20, prompts: Sequence[str] = ("Hi",)
) -> Stream:
    """Return an account that biases other tokens in every request until the vocabulary is through.

    One full logit vector takes ``vocabulary / biased`` requests of one prompt (arXiv 2403.06634, section 4).

    Args:
        name: of the account.
        vocabulary: of the model.
        requests: how many.
        seed: of the order of the tokens.
        biased: tokens of a request, each shown by ``top_logprobs``.
        prompts: a fresh one begins after each pass over the vocabulary.
    """
    generator = np.random.default_rng([seed, *name.encode()])
    order = generator.permutation(vocabulary)
    made = []
    for place in range(requests):
        first = place * biased % vocabulary
        made.append(
            Request(
                text=prompts[place * biased // vocabulary % len(prompts)],
                time=_START + 2.0 * place,
                max_tokens=1,
                top_logprobs=biased,
                biased=tuple(order[first : first + biased].tolist()),
                attack=True,
            )
        )
    return Stream(
        principal=name,
        tenant="labelling",
        family="logit sweep",
        requests=tuple(made),
        campaign="logit sweep",
        parameters=(("temperature", 0.0),),
    )


def classifier(name: str, texts: Sequence[str], vocabulary: int, requests: int, seed: int, labels: int) -> Stream:
    """Return an innocent account that classifies texts with the same few biased label tokens in every request."""
    generator = np.random.default_rng([seed, *name.encode()])
    tokens = tuple(sorted(generator.choice(vocabulary, labels, replace=False).tolist()))
    made = tuple(
        Request(
            text=texts[int(generator.integers(len(texts)))],
            time=_START + 2.0 * place,
            max_tokens=1,
            top_logprobs=min(labels, 20),
            biased=tokens,
        )
        for place in range(requests)
    )
    return Stream(
        principal=name,
        tenant="labelling",
        family="classifier",
        requests=made,
        parameters=(("temperature", 0.0),),
    )
