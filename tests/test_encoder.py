"""Encoders against independent arithmetic: BM25 written out here, mean pooling written out here."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag.encoders import CorpusCounts, Encoder, LexicalEncoder, RescoringEncoder, StatisticalEncoder, open_encoder
from blockrag.errors import InputError
from blockrag.passage import Passage


def passage(text, title="", id="p", **more):
    return Passage(id=id, text=text, title=title, **more)


def terms(text, title=""):
    return LexicalEncoder().passage_terms([passage(text, title)])[0]


# -- lexical --------------------------------------------------------------------------------------------------------


def test_lexical_is_an_encoder_that_uses_statistics():
    assert isinstance(LexicalEncoder(), Encoder)
    assert isinstance(LexicalEncoder(), StatisticalEncoder)
    assert LexicalEncoder().name == LexicalEncoder(1024).name != LexicalEncoder(2048).name


def test_directions_are_the_hash_bits_of_the_stem_on_every_platform():
    vector = LexicalEncoder(64).encode_queries(["Photosynthesis!"])[0] * 8
    bits = np.unpackbits(np.frombuffer(hashlib.shake_128(b"blockrag lexical 1\0photosynthesi").digest(8), np.uint8))
    np.testing.assert_array_equal(vector, 2.0 * bits - 1)
    assert "".join("-+"[int(x > 0)] for x in vector[:24]) == "+++-+++++++-+-+----++-+-"


CORPUS = [
    "The cat sat on the mat, and the cats purred.",
    "A dog chased two cats up a tree in 1990.",
    "Trees grow; the tallest tree is 115.9 metres, about 380 feet.",
    "Dogs bark at night. Dogs, dogs, dogs.",
    "Nothing of the kind happened in Paris.",
]


def plain_bm25(question, text, corpus):
    """BM25 by its textbook formula, with average length 100 and words given by the encoder's own terms."""
    counts = [Counter(counted(t)) for t in corpus]
    words = Counter(counted(text))
    score = 0.0
    for stem in set(counted(question)):
        n = sum(stem in c for c in counts)
        idf = math.log(1 + (len(corpus) - n + 0.5) / (n + 0.5))
        tf = words[stem]
        score += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * sum(words.values()) / 100))
    return score


def counted(text):
    """Words one at a time, so that repeats count."""
    found = []
    for word in text.replace(",", " ").replace(";", " ").split():
        found += sorted(terms(word.strip(".?!")))
    return found


def test_inner_product_is_bm25_up_to_the_projections_noise():
    encoder = LexicalEncoder(65536)
    passages = [passage(text) for text in CORPUS]
    vectors = encoder.encode_passages(passages)
    for question in [
        "Where did the cat sit on a mat?",
        "How tall is the tallest tree?",
        "dogs barking at night in 1990",
    ]:
        query = encoder.encode_queries_with([question], CorpusCounts(encoder.passage_terms(passages)))[0]
        expected = [plain_bm25(question, text, CORPUS) for text in CORPUS]
        noise = np.linalg.norm(query) * np.linalg.norm(vectors, axis=1) / 256
        assert np.all(np.abs(vectors @ query - expected) < 5 * noise)
        assert int(np.argmax(vectors @ query)) == int(np.argmax(expected))


def test_the_score_is_bm25_itself():
    encoder = LexicalEncoder(8)
    passages = [passage(text) for text in CORPUS]
    counts = CorpusCounts(encoder.passage_terms(passages))
    for question in ["Where did the cat sit on a mat?", "dogs, dogs; zebras in 1990", "what is the", ""]:
        expected = [plain_bm25(question, text, CORPUS) for text in CORPUS]
        np.testing.assert_allclose(encoder.score(question, passages, counts), expected, rtol=1e-12)
    assert encoder.score("cat", [], counts) == []
    huge = "cat dog " * 5000
    short, long = encoder.score("tree", [passage("cat tree"), passage(huge + "tree")], counts)
    assert short > long > 0
    assert isinstance(encoder, RescoringEncoder)


def test_a_vector_does_not_depend_on_its_batch_its_id_or_its_metadata():
    encoder = LexicalEncoder(128)
    alone = [encoder.encode_passages([passage(text, title="T")])[0] for text in CORPUS]
    together = encoder.encode_passages(
        [passage(t, title="T", id=f"x{i}", metadata={"i": i}) for i, t in enumerate(CORPUS)]
    )
    np.testing.assert_array_equal(np.stack(alone), together)
    assert together.dtype == np.float32


def test_the_title_counts_as_text():
    encoder = LexicalEncoder(64)
    titled, plain = encoder.encode_passages(
        [passage("of Norway", title="The capital"), passage("The capital of Norway")]
    )
    np.testing.assert_array_equal(titled, plain)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Beyoncé", "beyonce"),
        ("STRASSE", "Straße"),
        ("1,000,000 people", "1000000 people"),
        ("ｆｕｌｌｗｉｄｔｈ", "fullwidth"),
        ("cafe\u0301", "café"),
        ("مُحَمَّد", "محمد"),
        ("the dog’s bone", "dogs' bones"),
        ("snake_case", "snake case"),
        ("running", "runs"),
        ("Й\u0306", "й"),
    ],
)
def test_spellings_that_are_one_word(one, other):
    assert terms(one) == terms(other) != frozenset()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3.14 is not 314", {"3.14", "314", "not"}),
        ("B2B in 1990s, MP3", {"b2b", "1990", "mp3"}),
        ("हिन्दी भाषा", {"हिन्दी", "भाषा"}),
        ("日本語", {"日本", "本語"}),
        ("木", {"木"}),
        ("日本のJR線", {"日本", "本の", "jr", "線"}),
        ("서울시", {"서울", "울시"}),
        ("s", {"s"}),
        ("x" * 500, {"x" * 64}),
        ("1" + ",000" * 50, {"1" + "000" * 21}),
        ("a\0b\x1b[31mc\ud7ff", {"b", "31mc"}),
        ("what is the of", set()),
        ("?! ... —", set()),
        ("", set()),
    ],
)
def test_what_counts_as_a_word(text, expected):
    assert terms(text) == expected


def test_texts_without_a_word_and_questions_without_a_known_one_are_zero():
    encoder = LexicalEncoder(64)
    counts = CorpusCounts(encoder.passage_terms([passage("a tree"), passage("a dog")]))
    assert not encoder.encode_passages([passage("")]).any()
    assert not encoder.encode_queries(["", "what is the"]).any()
    queries = encoder.encode_queries_with(["", "what is it?", "zebra", "zebra tree"], counts)
    assert queries.any(axis=1).tolist() == [False, False, False, True]
    np.testing.assert_array_equal(queries[3], encoder.encode_queries_with(["tree"], counts)[0])


def test_empty_batches_and_an_empty_corpus():
    encoder = LexicalEncoder(64)
    for empty in (
        encoder.encode_passages([]),
        encoder.encode_queries([]),
        encoder.encode_queries_with([], CorpusCounts()),
    ):
        assert empty.shape == (0, 64)
        assert empty.dtype == np.float32
    assert not encoder.encode_queries_with(["tree"], CorpusCounts()).any()
    assert encoder.passage_terms([]) == []


def test_rare_words_weigh_more_and_common_ones_never_count_against():
    encoder = LexicalEncoder(1024)
    counts = CorpusCounts([{"tree", "oak"}, {"tree"}, {"tree"}])
    oak, tree = encoder.encode_queries_with(["oak", "tree"], counts)
    assert np.linalg.norm(oak) > np.linalg.norm(tree) > 0
    assert counts.passages == 3
    assert counts.passages_with(["tree", "fir"]) == {"tree": 3}


def test_long_passages_are_summed_in_pieces():
    words = [f"w{i}" for i in range(3000)]
    encoder = LexicalEncoder(64)
    weight = 2.2 / (1 + 1.2 * (0.25 + 0.75 * 30))
    expected = weight * encoder.encode_queries(words).astype(np.float64).sum(axis=0)
    np.testing.assert_allclose(encoder.encode_passages([passage(" ".join(words))])[0], expected, atol=1e-5)


def test_a_hundred_thousand_characters_of_anything():
    for text in ("x" * 100_000, "\0\n\t " * 25_000, "日" * 100_000, "e\u0301" * 50_000, "9," * 50_000, "'" * 100_000):
        assert np.isfinite(LexicalEncoder(64).encode_passages([passage(text)])).all()


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_finds_itself(text):
    encoder = LexicalEncoder(256)
    (own,) = encoder.passage_terms([passage(text)])
    query = encoder.encode_queries_with([text], CorpusCounts([own]))[0]
    vector = encoder.encode_passages([passage(text)])[0]
    assert np.isfinite(vector).all()
    assert vector.any() == query.any() == bool(own) or len(own) > 1
    assert all(term and len(term) <= 64 for term in own)


def test_a_lone_surrogate_in_a_question_is_ignored():
    encoder = LexicalEncoder(64)
    np.testing.assert_array_equal(*encoder.encode_queries(["tree \ud800", "tree"]))


def test_threads_agree():
    encoder = LexicalEncoder(256)
    passages = [passage(f"thread words {i} {'abcdef'[i % 6]}ness running{i}") for i in range(200)]
    expected = encoder.encode_passages(passages)
    with ThreadPoolExecutor(8) as pool:
        for vectors in pool.map(lambda _: encoder.encode_passages(passages), range(16)):
            np.testing.assert_array_equal(vectors, expected)


@pytest.mark.parametrize("dimension", [0, -8, 7, 1023, 65544])
def test_lexical_dimensions_that_are_refused(dimension):
    with pytest.raises(InputError, match=str(dimension)):
        LexicalEncoder(dimension)


# -- trained encoders -----------------------------------------------------------------------------------------------


def save_bert(directory, *, seed=0, architecture="BertModel", safe=True):
    """A BERT of two layers with a letter vocabulary, laid out as on the hub; 48 tokens at most."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=48,
    ).save_pretrained(directory)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(directory)
    if not safe:
        # As facebook/contriever is published: one pickle of tensors, no safetensors.
        torch.save(model.state_dict(), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
    facts = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(facts | {"architectures": [architecture]}))
    return directory


@pytest.fixture(scope="module")
def contriever_directory(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("contriever"), architecture="Contriever", safe=False)


@pytest.fixture(scope="module")
def contriever(contriever_directory):
    return open_encoder(str(contriever_directory))


def mean_pooled(directory, text, *, max_tokens=48):
    """Masked mean pooling of one text, by itself: without padding the mask is all ones."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, add_pooling_layer=False).eval()
    tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_tokens)
    with torch.no_grad():
        return model(**tokens).last_hidden_state[0].mean(dim=0).numpy()


TEXTS = ["a", "hello there", "the quick brown fox jumps", "x y z " * 5, "?"]


def test_contriever_is_the_unnormalized_masked_mean(contriever, contriever_directory):
    expected = np.stack([mean_pooled(contriever_directory, text) for text in TEXTS])
    together = contriever.encode_queries(TEXTS)
    np.testing.assert_allclose(together, expected, atol=2e-6)
    assert together.dtype == np.float32
    assert contriever.dimension == 32
    assert abs(np.linalg.norm(together, axis=1) - 1).min() > 0.1


def test_contriever_reads_title_space_text(contriever, contriever_directory):
    passages = [passage("text of it", title="some title"), passage("untitled")]
    expected = [
        mean_pooled(contriever_directory, "some title text of it"),
        mean_pooled(contriever_directory, "untitled"),
    ]
    np.testing.assert_allclose(contriever.encode_passages(passages), expected, atol=2e-6)


def test_padding_changes_nothing(contriever):
    alone = np.concatenate([contriever.encode_queries([text]) for text in TEXTS])
    np.testing.assert_allclose(contriever.encode_queries(TEXTS), alone, atol=2e-6)


def test_long_texts_are_cut_at_max_tokens(contriever_directory):
    from blockrag.encoders import ContrieverEncoder

    encoder = ContrieverEncoder(contriever_directory, max_tokens=10, device="cpu", batch_size=2)
    text = "abc def ghi jkl mno"
    expected = mean_pooled(contriever_directory, text, max_tokens=10)
    np.testing.assert_allclose(encoder.encode_queries([text])[0], expected, atol=2e-6)
    assert abs(expected - mean_pooled(contriever_directory, text)).max() > 1e-3


def test_the_models_own_limit_is_never_exceeded(contriever, contriever_directory):
    text = "a" * 500 + " b" * 500
    np.testing.assert_allclose(contriever.encode_queries([text])[0], mean_pooled(contriever_directory, text), atol=2e-6)


def test_empty_text_and_empty_batches_are_defined(contriever, contriever_directory):
    np.testing.assert_allclose(
        contriever.encode_passages([passage("")])[0], mean_pooled(contriever_directory, ""), atol=2e-6
    )
    assert contriever.encode_queries([]).shape == (0, 32)
    assert contriever.encode_passages([]).shape == (0, 32)


def test_threads_share_one_trained_encoder(contriever):
    expected = contriever.encode_queries(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        for vectors in pool.map(lambda _: contriever.encode_queries(TEXTS), range(8)):
            np.testing.assert_allclose(vectors, expected, atol=2e-6)


def test_a_name_follows_the_weights_not_the_path(contriever, contriever_directory, tmp_path):
    from blockrag.encoders import ContrieverEncoder

    moved = shutil.copytree(contriever_directory, tmp_path / "moved")
    contriever.encode_queries(TEXTS)
    names = {
        "moved": open_encoder(str(moved)).name,
        "shorter": ContrieverEncoder(contriever_directory, max_tokens=10).name,
        "other weights": open_encoder(f"contriever:{save_bert(tmp_path / 'other', seed=1)}").name,
        "other use": open_encoder(f"st:{contriever_directory}").name,
    }
    assert names.pop("moved") == contriever.name
    assert len({contriever.name, *names.values()}) == 4
    assert str(contriever_directory) not in contriever.name


@pytest.fixture(scope="module")
def pipeline_directory(contriever_directory, tmp_path_factory):
    """A sentence-transformers model with prompts that normalizes."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    bare = SentenceTransformer(str(contriever_directory), model_kwargs={"add_pooling_layer": False})
    model = SentenceTransformer(modules=[*bare, Normalize()], prompts={"query": "q ", "document": "d "})
    directory = tmp_path_factory.mktemp("pipeline") / "contriever-like"
    model.save(str(directory))
    return directory


def test_sentence_transformers_keep_their_prompts_and_pooling(pipeline_directory, contriever_directory):
    encoder = open_encoder(f"st:{pipeline_directory}")
    query = mean_pooled(contriever_directory, "q hello")
    document = mean_pooled(contriever_directory, "d title hello")
    np.testing.assert_allclose(encoder.encode_queries(["hello"])[0], query / np.linalg.norm(query), atol=2e-6)
    found = encoder.encode_passages([passage("hello", title="title")])[0]
    np.testing.assert_allclose(found, document / np.linalg.norm(document), atol=2e-6)
    assert isinstance(encoder, Encoder)
    assert not isinstance(encoder, StatisticalEncoder)
    assert encoder.name.startswith("sentence-transformer-")


def test_a_pipeline_is_not_taken_for_contriever(pipeline_directory):
    with pytest.raises(InputError, match=r"Normalize.*st:"):
        open_encoder(f"contriever:{pipeline_directory}")


def test_a_model_without_a_fast_tokenizer_and_without_a_limit(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = np.eye(3, 4, dtype=np.float32)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu").save(
        str(tmp_path)
    )
    encoder = open_encoder(f"st:{tmp_path}")
    np.testing.assert_allclose(encoder.encode_queries(["a b", "b"]), [[0.5, 0.5, 0, 0], [0, 1, 0, 0]])
    assert encoder.name == open_encoder(f"st:{tmp_path}").name


def test_a_tokenizer_written_in_python_still_has_an_identity():
    from transformers import ByT5Tokenizer

    from blockrag.encoders.sentence_transformer import _tokenizer_facts

    assert _tokenizer_facts(ByT5Tokenizer()) == _tokenizer_facts(ByT5Tokenizer()) != _tokenizer_facts(None)
    assert _tokenizer_facts(ByT5Tokenizer(extra_ids=3)) != _tokenizer_facts(ByT5Tokenizer())


# -- specs ----------------------------------------------------------------------------------------------------------


def test_lexical_specs():
    assert open_encoder("lexical").name == LexicalEncoder(1024).name
    assert open_encoder("lexical:2048").dimension == 2048


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "bm25",
        "lexical:",
        "lexical:x",
        "lexical:-8",
        "lexical:٨",
        "lexical:99999999999",
        "st:",
        "contriever:",
        "a\0b",
    ],
)
def test_specs_that_name_nothing(spec):
    with pytest.raises(InputError):
        open_encoder(spec)


def test_directories_that_hold_no_encoder(tmp_path, contriever_directory):
    for spec in (f"st:{tmp_path / 'missing'}", f"contriever:{tmp_path / 'missing'}", f"{tmp_path}/contriever"):
        with pytest.raises(InputError, match="no encoder directory"):
            open_encoder(spec)
    with pytest.raises(InputError, match="cannot load the encoder"):
        open_encoder(f"st:{tmp_path}")
    with pytest.raises(InputError, match="unknown encoder"):
        open_encoder(str(tmp_path))
    for config in ("[]", "not json", '{"architectures": null}', '{"architectures": ["BertModel"]}'):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(InputError, match="unknown encoder"):
            open_encoder(str(tmp_path))


def test_numbers_that_are_refused(contriever_directory):
    from blockrag.encoders import ContrieverEncoder, SentenceTransformerEncoder

    with pytest.raises(InputError, match="batch_size 0"):
        ContrieverEncoder(contriever_directory, batch_size=0)
    with pytest.raises(InputError, match="max_tokens 0"):
        SentenceTransformerEncoder(contriever_directory, max_tokens=0)
    with pytest.raises(InputError, match="cannot load"):
        ContrieverEncoder(contriever_directory, device="toaster")


def test_a_bare_contriever_spec_means_the_published_one(monkeypatch, contriever_directory):
    from blockrag.encoders import contriever as module

    monkeypatch.setattr(module, "DEFAULT_CONTRIEVER", str(contriever_directory))
    assert open_encoder("contriever").dimension == 32


def test_unknown_names_of_the_package():
    import blockrag.encoders

    with pytest.raises(AttributeError, match="Nonsense"):
        blockrag.encoders.Nonsense  # noqa: B018


def test_the_lexical_encoder_needs_none_of_the_heavy_libraries():
    code = """
import sys
from blockrag.encoders import open_encoder
open_encoder("lexical").encode_queries(["x"])
print(sorted({"torch", "transformers", "sentence_transformers", "faiss"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
