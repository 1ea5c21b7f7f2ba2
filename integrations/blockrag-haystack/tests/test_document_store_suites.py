"""Haystack's own suites for document stores: the base tests, and those of every optional method."""

import inspect

import pytest
from haystack import Document
from haystack.document_stores.errors import DuplicateDocumentError
from haystack.document_stores.types import DuplicatePolicy
from haystack.testing import document_store as suite

from haystack_integrations.document_stores.blockrag import BlockRAGDocumentStore

try:
    from haystack.testing import document_store_async as async_suite
except ImportError:  # Haystack 2 has no suites for asynchronous methods.
    async_suite = None

# Each release has suites for more optional methods; all of them are ours as well.
_SYNC = [suite.DocumentStoreBaseExtendedTests] + [
    cls
    for name, cls in inspect.getmembers(suite, inspect.isclass)
    if name.endswith("Test") and not issubclass(suite.DocumentStoreBaseExtendedTests, cls)
]
_ASYNC = [cls for name, cls in inspect.getmembers(async_suite, inspect.isclass) if name.endswith("Test")]


class TestDocumentStore(*_SYNC, *_ASYNC):
    @pytest.fixture
    def document_store(self, tmp_path):
        store = BlockRAGDocumentStore(tmp_path)
        yield store
        store.close()

    def test_write_documents(self, document_store):
        documents = [Document(content="test doc 1"), Document(content="test doc 2")]
        assert document_store.write_documents(documents) == 2
        assert document_store.filter_documents() == documents
        with pytest.raises(DuplicateDocumentError, match=f"{documents[1].id}.*OVERWRITE"):
            document_store.write_documents([Document(content="new"), documents[1]], DuplicatePolicy.NONE)
        assert document_store.count_documents() == 2

    async def test_write_documents_async(self, document_store):
        document = Document(content="test doc")
        assert await document_store.write_documents_async([document]) == 1
        assert await document_store.filter_documents_async() == [document]
        with pytest.raises(DuplicateDocumentError, match=document.id):
            await document_store.write_documents_async([document])


class TestDocumentStoreInMemory(TestDocumentStore):
    @pytest.fixture
    def document_store(self):
        return BlockRAGDocumentStore()
