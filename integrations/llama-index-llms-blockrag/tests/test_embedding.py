"""The embeddings against the encoders they stand for, on a checkpoint with Contriever's structure."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle

import numpy as np
import pytest
import torch
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.base.embeddings.base import SimilarityMode
from llama_index.core.schema import TextNode
from llama_index.llms.blockrag.embedding import ContrieverEmbedding, LexicalEmbedding
from llama_index.llms.blockrag.vector_store import BlockRAGVectorStore
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from blockrag.encoders import LexicalEncoder

TEXTS = ["a", "hello there", "the quick brown fox jumps", "x y z " * 4 + "x"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny BERT: what a Contriever checkpoint holds."""
    directory = tmp_path_factory.mktemp("contriever")
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
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        architectures=["Contriever"],
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(directory)
    return directory


def mean_pooled(directory, text):
    """Masked mean pooling of one text by itself, as the model card of Contriever has it."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, add_pooling_layer=False).eval()
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt", truncation=True)).last_hidden_state[0].mean(dim=0).numpy()


def test_contriever_is_the_mean_without_normalisation(directory):
    embedding = ContrieverEmbedding(model_name=str(directory), device="cpu")
    expected = np.stack([mean_pooled(directory, text) for text in TEXTS])
    np.testing.assert_allclose(embedding.get_text_embedding_batch(TEXTS), expected, atol=2e-6)
    np.testing.assert_allclose(embedding.get_text_embedding(TEXTS[1]), expected[1], atol=2e-6)
    np.testing.assert_allclose(embedding.get_query_embedding(TEXTS[2]), expected[2], atol=2e-6)
    assert np.abs(np.linalg.norm(expected, axis=1) - 1).min() > 0.1
    product = embedding.similarity(expected[0].tolist(), expected[1].tolist())
    assert product == pytest.approx(float(expected[0] @ expected[1]), rel=1e-5)
    assert embedding.similarity(expected[0], expected[0], SimilarityMode.DEFAULT) == pytest.approx(1.0, rel=1e-5)


def test_texts_are_cut_where_it_is_told(directory):
    embedding = ContrieverEmbedding(model_name=str(directory), device="cpu", max_tokens=6)
    assert embedding.get_text_embedding("a b c d e f g h") == embedding.get_text_embedding("a b c d")


@pytest.mark.parametrize("kind", ["contriever", "lexical"])
def test_copies_give_the_same_vectors_and_load_late(kind, directory):
    embedding = (
        ContrieverEmbedding(model_name=str(directory), device="cpu")
        if kind == "contriever"
        else LexicalEmbedding(dimension=128)
    )
    expected = embedding.get_text_embedding("hello there")
    fields = json.loads(json.dumps(embedding.to_dict()))
    copies = [pickle.loads(pickle.dumps(embedding)), copy.deepcopy(embedding), type(embedding).from_dict(fields)]
    for other in copies:
        assert other._encoder is None
        assert other.get_text_embedding("hello there") == expected
    assert fields["class_name"] == embedding.class_name() == type(embedding).__name__


def test_an_unknown_model_is_a_value_error_at_first_use():
    embedding = ContrieverEmbedding(model_name="/nowhere/at/all")
    with pytest.raises(ValueError, match="/nowhere/at/all"):
        embedding.get_query_embedding("hello")


def test_lexical_is_the_lexical_encoder():
    assert len(LexicalEmbedding().get_text_embedding("hello")) == LexicalEncoder().dimension
    embedding, encoder = LexicalEmbedding(dimension=64), LexicalEncoder(64)
    assert embedding.get_query_embedding("red foxes") == encoder.encode_queries(["red foxes"])[0].tolist()


async def test_asynchronously_too():
    embedding = LexicalEmbedding(dimension=64)
    assert await embedding.aget_query_embedding("red foxes") == embedding.get_query_embedding("red foxes")
    assert await embedding.aget_text_embedding("red foxes") == embedding.get_text_embedding("red foxes")
    together = await asyncio.gather(*(embedding.aget_text_embedding_batch([text, "x"]) for text in TEXTS))
    assert together == [embedding.get_text_embedding_batch([text, "x"]) for text in TEXTS]


@pytest.mark.parametrize("kind", ["contriever", "lexical"])
def test_retrieval_ranks_by_the_inner_product(kind, directory):
    embedding = (
        ContrieverEmbedding(model_name=str(directory), device="cpu")
        if kind == "contriever"
        else LexicalEmbedding(dimension=256)
    )
    store = BlockRAGVectorStore()
    index = VectorStoreIndex.from_vector_store(store, embed_model=embedding)
    for number, text in enumerate(TEXTS):
        index.insert(Document(id_=str(number), text=text))
    hits = index.as_retriever(similarity_top_k=4).retrieve("the brown fox")
    query = np.array(embedding.get_query_embedding("the brown fox"))
    scores = {text: float(np.array(embedding.get_text_embedding(text)) @ query) for text in TEXTS}
    assert [hit.text for hit in hits] == sorted(scores, key=lambda text: -scores[text])
    assert [hit.score for hit in hits] == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-5)
    assert all(isinstance(hit.node, TextNode) for hit in hits)
