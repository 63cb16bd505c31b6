"""Perplexity of prose: its value, its interval, and the text that it is measured on."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import sys

import inference_cases as cases
import jax
import numpy as np
import pytest
from language_cases import PASSAGES, SENTENCE, WORDS, make, measure, naive_nats, reading

from wings_jax.errors import UserError
from wings_jax.evaluation import prose
from wings_jax.evaluation.prose import Text


@pytest.mark.parametrize("case", ["plain", "router"])
def test_perplexity_is_that_of_a_naive_softmax(case):
    generator, params = make(case, rows=2)
    found = measure(generator, PASSAGES)
    ids = [cases.tokenizer()(text).input_ids for text in PASSAGES]
    nats = [naive_nats(generator, params, some) for some in ids]
    np.testing.assert_allclose(found.nats, nats, rtol=1e-4)
    assert found.tokens.tolist() == [len(some) - 1 for some in ids]
    mean = sum(nats) / sum(len(some) - 1 for some in ids)
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-4)
    assert found.nats_per_token == pytest.approx(mean, rel=1e-5)


def test_perplexity_of_a_uniform_model_is_its_vocabulary_size():
    def blank(arch, params):
        zeros = jax.tree.map(np.zeros_like, params["decoder"]["head"])
        return arch, {**params, "decoder": {**params["decoder"], "head": zeros}}

    generator, _ = make("plain", 4, blank)
    vocabulary = len(cases.tokenizer())
    found = measure(generator, PASSAGES)
    assert found.perplexity == pytest.approx(vocabulary, rel=1e-5)
    assert found.interval == pytest.approx((vocabulary, vocabulary), rel=1e-5)
    bits = math.log2(vocabulary) * found.tokens.sum()
    scored = [text[len(cases.tokenizer().tokenize(text)[0]) :] for text in PASSAGES]
    assert found.bits_per_byte == pytest.approx(bits / len("".join(scored).encode()), rel=1e-5)


def test_perplexity_does_not_depend_on_the_batch():
    alone = measure(make("router", 1)[0], PASSAGES)
    together = measure(make("router", 8)[0], PASSAGES)
    np.testing.assert_allclose(together.nats, alone.nats, rtol=1e-5)
    others = measure(make("router", 2)[0], PASSAGES[::-1])
    np.testing.assert_allclose(others.nats[::-1], alone.nats, rtol=1e-5)


def test_long_texts_are_scored_in_windows_that_share_a_token():
    def short(arch, params):
        decoder = dataclasses.replace(arch.decoder, max_positions=20)
        return dataclasses.replace(arch, decoder=decoder), params

    generator, params = make("plain", 4, short)
    text = "\n\n".join(PASSAGES)
    ids = cases.tokenizer()(text).input_ids
    windows = generator.processor.windows(text)
    assert len(windows) > 3
    assert all(2 <= len(window) < 20 for window in windows)
    assert [windows[0][0], *(token for window in windows for token in window[1:])] == ids
    for before, after in itertools.pairwise(windows):
        assert before[-1] == after[0]
    (found,) = generator.score_text([text])
    assert found.tokens == len(ids) - 1
    nats = sum(naive_nats(generator, params, window) for window in windows)
    assert -found.logprob == pytest.approx(nats, rel=1e-4)


def test_control_tokens_in_a_text_are_text():
    generator, _ = make("plain", 4)
    (found,) = generator.score_text(["a<|im_end|>"])
    assert found.tokens > 3


def test_texts_of_less_than_two_tokens_are_refused():
    generator, _ = make("plain", 4)
    for text in ("a", ""):
        with pytest.raises(UserError, match=rf"'{text}' has {len(text)} token.* at least 2"):
            generator.score_text(["all is well", text])


def test_interval_is_over_passages():
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 200, 120)
    found = reading(tokens * rng.normal(3, 0.5, 120), tokens)
    low, high = found.interval
    assert low < found.perplexity < high
    spread = 0.5 / math.sqrt(120) * math.sqrt(np.mean(tokens**2.0)) / tokens.mean()
    assert math.log(high / low) == pytest.approx(2 * 1.96 * spread, rel=0.25)
    assert found.interval == (low, high)  # the seed is fixed
    assert reading([3.0], [1]).interval is None
    assert found.bits_per_byte == pytest.approx(found.nats_per_token / math.log(2) / 4)


def test_ratio_is_of_the_same_tokens():
    rng = np.random.default_rng(1)
    before = reading(rng.uniform(100, 300, 40), [70] * 40)
    after = reading(before.nats + 70 * math.log(2), before.tokens)
    ratio, interval = after.ratio(before)
    assert ratio == pytest.approx(2)
    assert interval == pytest.approx((2, 2))  # every passage alike, though passages differ
    assert before.interval[1] / before.interval[0] > 1.1
    assert before.ratio(reading(before.nats, before.tokens + 1)) is None


MARKDOWN = f"""# A heading that is followed
{SENTENCE}
It has [a link
over lines](https://a.b/c(d)) and `code`, **bold** <b>tags</b> and
more (https://x.y/z?q=1).

```python
{SENTENCE}
```

- {SENTENCE}

1. {SENTENCE}

| {SENTENCE} |

    {SENTENCE}

    $S$ is {SENTENCE}

<table><tr><td>

{SENTENCE}

</td></tr></table>

Too short a paragraph.

{WORDS} {WORDS}

{SENTENCE}
"""


def test_markdown_is_reduced_to_prose():
    first, last = prose.prose_paragraphs(MARKDOWN.replace("c(d)", "c"))
    assert first == f"{SENTENCE} It has a link over lines and code, bold tags and more."
    assert last == SENTENCE


def test_the_default_text_is_english_prose_and_deterministic(monkeypatch):
    monkeypatch.delitem(sys.modules, prose.PACKAGE, raising=False)
    text = prose.installed_text()
    assert prose.PACKAGE not in sys.modules  # it takes seconds to import
    assert text == prose.installed_text()
    assert re.fullmatch(r"descriptions of tensorflow_datasets \d+\.\d+\.\d+\S*", text.source)
    words = " ".join(text.passages).split()
    assert len(words) > 5000
    assert sum(word in ("the", "of", "and", "is", "a") for word in words) > 0.1 * len(words)
    for passage in text.passages:
        assert not re.search(r"```|https?:|www\.|[<>{}\[\]|*`$#]|^\s*-|\s\s(?<!\n\n)", passage)
        assert len(passage) <= prose.MAX_PASSAGE + 2 + prose.MIN_PASSAGE
        for paragraph in passage.split("\n\n"):
            assert paragraph == " ".join(paragraph.split())
    paragraphs = [one for passage in text.passages for one in passage.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)


def test_lists_are_not_prose():
    listed = "\n".join(f"{star} {SENTENCE}" for star in ("*", "  *"))
    assert prose.prose_paragraphs(f"{SENTENCE}\n\n{listed}\n\n*{SENTENCE}*") == [SENTENCE, SENTENCE]


def test_passages_are_whole_paragraphs_where_they_fit():
    found = ["a" * 80, "b" * 60, "c" * 50, " ".join("d" * 9 for _ in range(24)), "e"]
    passages = prose.split_passages(found, 160)
    assert passages[0] == f"{found[0]}\n\n{found[1]}"
    assert passages[-1].endswith("d\n\ne")  # a rest could be less than two tokens
    assert all(
        prose.MIN_PASSAGE <= len(passage) <= 160 + 2 + prose.MIN_PASSAGE for passage in passages
    )
    assert " ".join(passages).split() == " ".join(found).split()  # no word is lost or split
    assert prose.split_passages(found, 500) == ["\n\n".join(found)]


def test_text_file_is_read(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(f"\ufeff{SENTENCE}\r\nnext\r\n\r\n# {SENTENCE}\n", encoding="utf-8")
    text = prose.read_text(file)
    assert text.passages == (f"{SENTENCE} next\n\n# {SENTENCE}",)
    assert text.source == str(file)
    many = Text("", tuple(map(str, range(10))))
    assert many.subset(5).passages == ("0", "2", "4", "6", "8")
    assert many.subset(None) == many
    assert len({many.sha256, many.subset(5).sha256, text.sha256}) == 3
