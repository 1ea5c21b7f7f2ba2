"""What a plan says is what a pass then does; what it measures leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from tiny_models import LONGROPE, ModelCase, tiny_model
from tiny_tokenizers import plain_tokenizer

import blockrag.demo
from blockrag.codec import Precision, encoded_nbytes
from blockrag.encoders import open_encoder
from blockrag.errors import InputError, StoreError
from blockrag.index import PassageIndex
from blockrag.ingest import Document, ingest
from blockrag.ingest.report import IngestReport
from blockrag.model.block_model import BlockModel
from blockrag.model.facts import BlockAttentionFacts
from blockrag.model.outline import ModelOutline
from blockrag.passage import Passage
from blockrag.planning import Plan, Target, Workload, plan
from blockrag.planning.advice import Advice, advise
from blockrag.planning.hit_rate import lru_hit_rate
from blockrag.planning.inventory import take_inventory
from blockrag.planning.measure import Rates, measure_rates
from blockrag.planning.planner import _evaluate
from blockrag.planning.target import available_memory
from blockrag.prompt import Block
from blockrag.stores import DiskStore, MemoryStore, open_store

CORPUS = (Path(blockrag.demo.__file__).parent / "corpus.jsonl").read_text("utf-8").splitlines()
REAL = Path(__file__).parent.parent.parent / "shared" / "data" / "hotpotqa-rpt-dev.jsonl"
SHORT = 0.2


@pytest.fixture(scope="module")
def model() -> BlockModel:
    return BlockModel.from_pretrained("demo", device="cpu", kept_bytes=0)


@pytest.fixture(scope="module")
def outline(model: BlockModel) -> ModelOutline:
    return ModelOutline.of(model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files as people have them: some repeat others, some cannot be used."""
    root = tmp_path / "documents"
    (root / "deeper").mkdir(parents=True)
    (root / "corpus.jsonl").write_text("\n".join([*CORPUS[:12], CORPUS[3]]), "utf-8")
    long = " ".join(json.loads(line)["text"] for line in CORPUS[12:22])
    (root / "long.txt").write_text(long, "utf-8")
    (root / "deeper" / "long.txt").write_text(long, "utf-8")
    (root / "deeper" / "note.md").write_text("# A note\n\nArvo lies in the north.\n", "utf-8")
    (root / "blank.txt").write_text(" \n\n ", "utf-8")
    (root / "title.jsonl").write_text(json.dumps({"text": "x", "title": "so very long " * 200}), "utf-8")
    (root / "binary.bin").write_bytes(bytes(range(256)))
    return root


def ingested(sources: list[object], model: BlockModel, *, path: Path | None = None, tokens: int = 256) -> IngestReport:
    store = MemoryStore() if path is None else DiskStore(path / "kv")
    with PassageIndex(open_encoder("lexical"), None if path is None else path / "index") as index:
        report = ingest(sources, index=index, model=model, store=store, max_passage_tokens=tokens)
    store.close()
    return report


def assert_same(made: Plan, report: IngestReport) -> None:
    counted = made.inventory
    assert counted.is_exact
    assert (counted.documents, counted.passages) == (report.documents, report.passages)
    assert counted.distinct_blocks - counted.stored_blocks == report.blocks_new
    assert counted.tokens - counted.stored_tokens == report.tokens_new
    assert made.new_bytes == report.bytes_new
    assert [str(one) for one in counted.failures] == [str(one) for one in report.failures]


# -- counting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [24, 256])
def test_counts_are_those_of_the_pass(folder: Path, tmp_path: Path, model: BlockModel, tokens: int) -> None:
    made = plan(
        [folder], ModelOutline.of(model), target=Target.in_directory(tmp_path / "kv"), max_passage_tokens=tokens
    )
    report = ingested([folder], model, tokens=tokens)
    assert_same(made, report)
    assert report.failures
    assert report.blocks_new < report.passages


@pytest.mark.skipif(not REAL.is_file(), reason="needs the shared data")
def test_counts_are_those_of_the_pass_on_real_text(tmp_path: Path, model: BlockModel) -> None:
    texts: list[object] = []
    with REAL.open(encoding="utf-8") as lines:
        for number, line in zip(range(6), lines, strict=False):
            texts.append(Document(f"{number}", " ".join(str(value) for value in json.loads(line).values())))
    made = plan(texts, ModelOutline.of(model), target=Target.in_directory(tmp_path / "kv"), max_passage_tokens=100)
    assert_same(made, ingested(texts, model, tokens=100))


@pytest.mark.parametrize("precision", get_args(Precision))
def test_bytes_are_exact_in_every_precision(model: BlockModel, precision: Precision) -> None:
    stored = BlockModel(
        model.model, model.tokenizer, template=model.template, precision=precision, facts=model.facts, kept_bytes=0
    )
    documents: list[object] = [Document(f"{n}", json.loads(line)["text"]) for n, line in enumerate(CORPUS[:9])]
    made = plan(documents, ModelOutline.of(model), target=Target.at("memory://"))
    assert made.nbytes[precision] == ingested(documents, stored).bytes_new


def test_what_is_stored_already_is_not_counted_again(folder: Path, tmp_path: Path, model: BlockModel) -> None:
    index = tmp_path / "index"
    target = Target.in_directory(index / "kv")
    ingested([folder], model, path=index)
    again = plan([folder], model, target=target, seconds=SHORT)
    assert again.new_bytes == 0
    assert again.inventory.stored == again.inventory.lengths
    (folder / "new.txt").write_text("Brask is a country. Its capital is Onder.", "utf-8")
    changed = plan([folder], model, target=target, seconds=SHORT)
    report = ingested([folder], model, path=index)
    assert (changed.inventory.distinct_blocks - changed.inventory.stored_blocks) == report.blocks_new == 1
    assert changed.new_bytes == report.bytes_new


def test_documents_that_came_as_passages_are_taken_as_they_are(model: BlockModel) -> None:
    passages: list[object] = [Passage(id=f"p{n}", text="word " * n, document_id="d") for n in (1, 2, 3)]
    made = plan(passages, ModelOutline.of(model), target=Target.at("memory://"))
    assert_same(made, ingested(passages, model))
    assert made.inventory.text_bytes == 5 * 6


def test_a_document_with_a_block_that_no_prompt_can_hold_fails_alone(model: BlockModel, outline: ModelOutline) -> None:
    limit = outline.profile.max_tokens
    assert limit is not None
    documents: list[object] = [Document("fits", "one two"), Document("too long", "many words " * limit)]
    made = plan(documents, outline, target=Target.at("memory://"), max_passage_tokens=10 * limit)
    assert_same(made, ingested(documents, model, tokens=10 * limit))
    assert [failure.document_id for failure in made.inventory.failures] == ["too long"]


# -- sampling ------------------------------------------------------------------------------------------------------


def test_a_sample_tells_about_all(outline: ModelOutline) -> None:
    documents = [Document(f"{n}", json.loads(line)["text"]) for n, line in enumerate(CORPUS)]
    exact = take_inventory(documents, outline)
    most = exact.text_bytes // 4
    sample = take_inventory(iter(documents), outline, sample_bytes=most)
    assert not sample.is_exact
    assert (sample.documents, sample.text_bytes) == (exact.documents, exact.text_bytes)
    assert 0 < sample.documents_counted < len(documents) / 3
    assert sample.error is not None
    assert 0 < sample.error < 0.2
    assert abs(sample.tokens / exact.tokens - 1) < 1.5 * sample.error
    assert abs(sample.passages / exact.passages - 1) < 0.1
    assert sample == take_inventory(documents, outline, sample_bytes=most)


def test_a_sample_that_holds_everything_is_exact(outline: ModelOutline) -> None:
    documents = [Document(f"{n}", f"text number {n}") for n in range(40)]
    exact = take_inventory(documents, outline)
    assert take_inventory(documents, outline, sample_bytes=exact.text_bytes) == exact
    assert (exact.scale, exact.error) == (1.0, 0.0)


@pytest.mark.parametrize("sample_bytes", [None, 300])
def test_progress_sees_every_document_once(outline: ModelOutline, sample_bytes: int | None) -> None:
    seen: Counter[str] = Counter()

    class Counting:
        def start(self, total_documents: int | None) -> None:
            seen["expected"] += total_documents or 0

        def advance(self, *, documents: int = 0, passages: int = 0, tokens: int = 0) -> None:
            seen.update(documents=documents, passages=passages, tokens=tokens)

        def finish(self) -> None:
            seen["finished"] += 1

    documents = [Document(f"{n}", f"text number {n}") for n in range(40)]
    inventory = take_inventory(documents, outline, sample_bytes=sample_bytes, progress=Counting())
    assert (seen["expected"], seen["documents"], seen["finished"]) == (40, 40, 1)
    assert seen["passages"] == inventory.counted_passages
    assert seen["tokens"] == sum(length * count for length, count in inventory.lengths.items())


def test_of_one_large_document_everything_is_counted(outline: ModelOutline) -> None:
    large = Document("large", "some words of a long text. " * 500)
    inventory = take_inventory([large], outline, sample_bytes=10)
    assert inventory.is_exact
    assert inventory.documents == 1


def test_failures_in_a_sample_leave_their_text_out(outline: ModelOutline) -> None:
    bad = [Document(f"bad {n}", "x", title="long " * 400) for n in range(50)]
    good = [Document(f"good {n}", f"a text that fits, number {n}") for n in range(50)]
    inventory = take_inventory([*bad, *good], outline, sample_bytes=600)
    assert not inventory.is_exact
    assert inventory.failures
    assert inventory.documents == 100 - len(inventory.failures)
    assert inventory.passages < 100


def test_kept_blocks_are_distinct_and_from_everywhere(outline: ModelOutline) -> None:
    documents = [Document(f"{n}", f"text number {n}") for n in range(400)]
    kept = take_inventory([*documents, *(Document(f"again {d.id}", d.text) for d in documents)], outline)
    assert len({block.token_ids for block in kept.blocks}) == len(kept.blocks) == 64
    numbers = [int(passage.text.split()[-1]) for passage in kept.passages_kept]
    assert min(numbers) < 60
    assert max(numbers) > 340


@pytest.mark.parametrize("wrong", [{"max_passage_tokens": 0}, {"sample_bytes": 0}])
def test_numbers_out_of_range_are_refused(outline: ModelOutline, wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="pass at least 1"):
        take_inventory([], outline, **wrong)  # type: ignore[arg-type]


# -- the whole plan ------------------------------------------------------------------------------------------------


def test_the_arithmetic_of_a_plan(folder: Path, tmp_path: Path, model: BlockModel) -> None:
    made = plan(
        [folder],
        model,
        target=Target.in_directory(tmp_path / "index" / "kv"),
        encoder=open_encoder("lexical"),
        workload=Workload(k=3, zipf=0.7),
        seconds=SHORT,
    )
    inventory, speed = made.inventory, made.speed
    assert speed is not None
    rates = speed.rates
    total = made.nbytes[model.precision]
    assert model.profile is not None
    assert total == sum(
        count * encoded_nbytes(model.profile.layout, length, model.precision)
        for length, count in inventory.lengths.items()
    )
    assert speed.load_s == pytest.approx(3 * total / inventory.distinct_blocks / rates.load_bytes_per_s)
    assert speed.compute_s == pytest.approx(
        3 * inventory.tokens / inventory.distinct_blocks / rates.prefill_tokens_per_s
    )
    assert speed.gain == pytest.approx(rates.load_bytes_per_s / speed.break_even_bytes_per_s)
    assert rates.encode_passages_per_s is not None
    assert speed.build_s > inventory.tokens / rates.build_tokens_per_s
    assert [budget.share for budget in made.budgets] == pytest.approx([0.1, 0.25, 0.5], abs=1e-3)
    for budget in made.budgets:
        assert budget.mean_s == pytest.approx(budget.hit_rate * speed.load_s + (1 - budget.hit_rate) * speed.compute_s)
    assert made.advice is not None
    assert made.fits
    assert made.needed_bytes == made.new_bytes + made.index_bytes
    assert not (tmp_path / "index").exists(), "a plan makes nothing"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".blockrag")]


def test_advice_heeds_the_budget_of_the_store_and_what_it_holds(outline: ModelOutline) -> None:
    inventory = take_inventory([Document(f"{n}", f"text number {n}") for n in range(50)], outline)
    rates = Rates("cpu", "float32", 5, 1e3, 1e3, 1e9)
    total = inventory.nbytes(outline.profile.layout, outline.precision)

    def advice(target: Target) -> Advice | None:
        return _evaluate(inventory, outline, target, Workload(), rates, dimension=None, budgets=()).advice

    unlimited, limited = advice(Target.at("memory://")), advice(Target.at(f"memory://?max_bytes={total // 2}"))
    assert unlimited is not None
    assert (unlimited.choice, unlimited.budget) == ("all", None)
    assert limited is not None
    assert (limited.choice, limited.budget) == ("hot part", total // 2)


def test_the_index_is_about_as_large_as_said(tmp_path: Path, outline: ModelOutline) -> None:
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(CORPUS), "utf-8")
    encoder = open_encoder("lexical")
    made = plan([file], outline, target=Target.in_directory(tmp_path / "kv"), encoder=encoder)
    with PassageIndex(encoder, tmp_path / "index") as index:
        ingest([file], index=index, model=None, store=MemoryStore(), tokenizer=outline.tokenizer)
    real = sum(path.stat().st_size for path in (tmp_path / "index").iterdir() if path.suffix in (".sqlite3", ".faiss"))
    assert made.index_bytes == pytest.approx(real, rel=0.15)


def test_an_outline_is_counted_and_not_measured(folder: Path, outline: ModelOutline) -> None:
    made = plan([folder], outline, target=Target.at("memory://"), budgets=[100_000])
    assert made.speed is None
    assert made.advice is None
    assert [(budget.nbytes, budget.mean_s) for budget in made.budgets] == [(100_000, None)]
    assert made.needed_bytes == 100_000
    assert made.free_bytes == pytest.approx(available_memory(), rel=0.5)


def test_a_bucket_has_no_end(folder: Path, outline: ModelOutline) -> None:
    made = plan([folder], outline, target=Target.at("s3://bucket/blocks"))
    assert made.free_bytes is None
    assert made.fits
    assert made.target.where == "s3://bucket/blocks"


def test_a_model_with_two_kinds_of_positions_says_so(folder: Path) -> None:
    long = BlockModel(
        tiny_model(ModelCase("phi3", "phi3", LONGROPE)),
        plain_tokenizer(),
        facts=BlockAttentionFacts(block_fine_tuned=True),
        kept_bytes=0,
    )
    made = plan([folder], long, target=Target.at("memory://"), max_passage_tokens=20, seconds=SHORT)
    assert made.second_copy_beyond == 64
    assert made.speed is not None
    # As many passages as fit what the short positions can place.
    assert made.speed.rates.passages < 5


@pytest.mark.parametrize(
    ("sources", "message"),
    [([], "no text"), ([Document("blank", " ")], "no text"), ([Document("t", "x", title="long " * 400)], "its title")],
)
def test_sources_without_text_are_refused(sources: list[object], message: str, outline: ModelOutline) -> None:
    with pytest.raises(InputError, match=message):
        plan(sources, outline, target=Target.at("memory://"))


def test_wrong_numbers_are_refused(outline: ModelOutline) -> None:
    with pytest.raises(InputError, match="k=0"):
        Workload(k=0)
    with pytest.raises(InputError, match="zipf=-1"):
        Workload(zipf=-1)
    with pytest.raises(InputError, match="a budget is 0"):
        plan([Document("d", "text")], outline, target=Target.at("memory://"), budgets=[0])


# -- measuring -----------------------------------------------------------------------------------------------------


def test_measuring_leaves_a_store_as_it_was(model: BlockModel, outline: ModelOutline, tmp_path: Path) -> None:
    blocks = take_inventory([Document(f"{n}", f"text {n}") for n in range(9)], outline).blocks
    store = DiskStore(tmp_path / "kv")
    model.materialize(blocks[:4], store)
    before = set(store.keys())
    rates = measure_rates(model, blocks, store, k=2, seconds=SHORT)
    assert set(store.keys()) == before
    # Fewer where the machine is slow.
    assert rates.passages in (1, 2)
    assert min(rates.prefill_tokens_per_s, rates.build_tokens_per_s, rates.load_bytes_per_s) > 0
    assert rates.encode_passages_per_s is None
    assert measure_rates(model, blocks[:4], store, k=50, seconds=SHORT).passages <= 4
    assert set(store.keys()) == before
    store.close()


def test_what_would_be_measured_wrongly_is_refused(model: BlockModel, outline: ModelOutline) -> None:
    blocks = take_inventory([Document(f"{n}", f"text {n}") for n in range(6)], outline).blocks
    keeping = BlockModel(model.model, model.tokenizer, template=model.template, facts=model.facts)
    with pytest.raises(InputError, match="kept_bytes=0"):
        measure_rates(keeping, blocks[:2], MemoryStore(), k=2, seconds=SHORT)
    room = len(encoded(model, blocks[:1])[0]) + 1
    with pytest.raises(StoreError, match="lost"):
        measure_rates(model, blocks, MemoryStore(max_bytes=room), k=3, seconds=3.0)
    for wrong in ({"k": 0}, {"seconds": 0.0}):
        with pytest.raises(InputError, match="nothing to measure"):
            measure_rates(model, blocks, MemoryStore(), **wrong)
    with pytest.raises(InputError, match="0 blocks"):
        measure_rates(model, [], MemoryStore())


def encoded(model: BlockModel, blocks: Sequence[Block]) -> list[memoryview]:
    store = MemoryStore()
    model.materialize(blocks, store)
    return [data for _, data in store.get_many(list(store.keys())) if data is not None]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a tmpfs is not allowed here ({error})")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_is_told_and_not_an_error(model: BlockModel, small_disk: Path) -> None:
    documents = [Document(f"{n}", json.loads(line)["text"]) for n, line in enumerate(CORPUS[:60])]
    made = plan(documents, model, target=Target.in_directory(small_disk / "kv"), seconds=30.0)
    assert not made.fits
    assert "full" in made.not_measured
    assert (made.speed, made.advice) == (None, None)
    assert list(small_disk.iterdir()) == []


# -- targets -------------------------------------------------------------------------------------------------------


def test_a_directory_is_measured_beside_itself(tmp_path: Path) -> None:
    target = Target.in_directory(tmp_path / "not yet" / "kv")
    assert target.where == str(tmp_path)
    with target.scratch_store() as store:
        (made,) = tmp_path.iterdir()
        assert made.name.startswith(".blockrag-plan-")
        assert list(store.keys()) == []
    assert list(tmp_path.iterdir()) == []
    with target.existing_store() as existing:
        assert existing is None
    assert list(tmp_path.iterdir()) == []


def test_a_url_and_a_directory_name_the_same_place(tmp_path: Path) -> None:
    odd = tmp_path / "a ?odd#dir%20"
    by_path = Target.in_directory(odd)
    assert Target.at(by_path.url).directory == odd
    assert Target.at(f"{by_path.url}?max_bytes=1GB") == Target(
        f"{by_path.url}?max_bytes=1GB", f"{by_path.url}?max_bytes=1GB", odd, 10**9
    )
    DiskStore(odd).close()
    with by_path.existing_store() as store:
        assert store is not None


def test_what_is_no_place_is_refused(tmp_path: Path) -> None:
    for wrong in ("somewhere", "disc:///data", "disk:///data?max_byte=1"):
        with pytest.raises(InputError, match="store"):
            Target.at(wrong)
    file = tmp_path / "file"
    file.write_text("x")
    with Target.in_directory(file / "kv").scratch_store() as store:
        assert list(store.keys()) == []


def test_of_tiers_the_last_one_counts(tmp_path: Path) -> None:
    target = Target.at(f"tiered:memory://?max_bytes=2GB|disk://{tmp_path}/kv?max_bytes=5GB")
    assert (target.url, target.max_bytes) == (f"disk://{tmp_path}/kv?max_bytes=5GB", 5 * 10**9)
    assert Target.at("tiered:memory://|redis://user@host:6379/0").name == "redis://***@host:6379/0"


def test_a_bucket_is_measured_in_itself(model: BlockModel, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    target = Target.at(f"file://{tmp_path}/blocks")
    text = [Document(f"{n}", f"text number {n}") for n in range(6)]
    with closing(open_store(target.url)) as store:
        model.materialize(take_inventory(text[:2], ModelOutline.of(model)).blocks, store)
        before = set(store.keys())
        made = plan(text, model, target=target, workload=Workload(k=2), seconds=SHORT)
        assert set(store.keys()) == before
    assert made.inventory.stored_blocks == len(before) == 2
    assert made.free_bytes is not None
    assert made.speed is not None


def test_memory_is_memory() -> None:
    target = Target.at("memory://?max_bytes=1GB")
    assert (target.where, target.directory) == ("memory", None)
    with target.existing_store() as store:
        assert store is None


# -- hit rates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.3])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_hit_rates_are_those_of_a_least_recently_used_store(exponent: float, share: float) -> None:
    blocks, requests = 3000, 60_000
    capacity = int(share * blocks)
    weights = np.arange(1, blocks + 1, dtype=float) ** -exponent
    asked = np.random.default_rng(0).choice(blocks, size=requests, p=weights / weights.sum())
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number, block in enumerate(asked.tolist()):
        hit = block in held
        held[block] = None
        held.move_to_end(block)
        if len(held) > capacity:
            held.popitem(last=False)
        hits += hit and number >= requests // 2
    assert lru_hit_rate(blocks, capacity, exponent=exponent) == pytest.approx(hits / (requests // 2), abs=0.015)


def test_hit_rates_at_the_ends() -> None:
    assert lru_hit_rate(10, 10) == lru_hit_rate(10, 11) == 1.0
    assert lru_hit_rate(10, 0.5) == 0.0
    assert lru_hit_rate(1000, 250, exponent=0) == pytest.approx(0.25, abs=0.001)
    rates = [lru_hit_rate(21_000_000, 21_000_000 * share, exponent=1) for share in (0.001, 0.01, 0.1, 0.5, 0.99)]
    assert rates == sorted(rates)
    assert 0.4 < rates[0] < rates[-1] < 1
    for wrong in ((0, 1.0, 1.0), (10, -1.0, 1.0), (10, 1.0, -1.0)):
        with pytest.raises(InputError, match="no hit rate"):
            lru_hit_rate(*wrong[:2], exponent=wrong[2])


def test_grouping_ranks_changes_nothing() -> None:
    blocks, capacity, exponent = 30_000, 2000.0, 0.9
    chances = np.arange(1, blocks + 1, dtype=float) ** -exponent
    chances /= chances.sum()
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-chances * middle)).sum() < capacity else (low, middle)
    exact = float((chances * (1 - np.exp(-chances * high))).sum())
    assert lru_hit_rate(blocks, capacity, exponent=exponent) == pytest.approx(exact, abs=1e-4)


# -- advice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "choice", "reason"),
    [
        ({"gain": 0.5}, "none", "2.0 times as long"),
        ({}, "all", "everything fits"),
        ({"room": None}, "all", "is not known"),
        ({"build_s": 90_000.0}, "lazy", "25.0 hours"),
        ({"fits": False}, "hot part", "60%"),
        ({"fits": False, "hit_rate": 0.01}, "none", "add disk"),
    ],
)
def test_advice_follows_from_the_facts(facts: dict[str, float], choice: str, reason: str) -> None:
    usual = {"gain": 8.0, "fits": True, "build_s": 60.0, "room": 1000, "hit_rate": 0.6}
    advice = advise(**{**usual, **facts})  # type: ignore[arg-type]
    assert advice.choice == choice
    assert reason in advice.reason
    assert advice.budget == (1000 if choice == "hot part" else None)
