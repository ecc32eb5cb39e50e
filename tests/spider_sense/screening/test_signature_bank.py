"""The bank of signatures: what is taken in, what fires, and what is refused."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spider_sense.errors import BankError, MismatchError, SignatureError
from spider_sense.fingerprint import Fingerprint
from spider_sense.folders import sha256
from spider_sense.screening.bank_making import with_traffic
from spider_sense.screening.exchange import export_signatures, import_signatures
from spider_sense.screening.signature import Kind, Signature, from_examples, merged
from spider_sense.screening.signature_bank import SignatureBank
from spider_sense.screening.signature_draft import draft
from spider_sense.screening.traffic import Traffic
from spider_sense.types import Site

WIDTH = 16
FINGERPRINT = Fingerprint(
    model_type="llama",
    architecture="Llama",
    base_model="tiny",
    layers=2,
    width=WIDTH,
    weight_digest="w",
    tokenizer_digest="t",
    chat_template_digest="c",
)
CENTRE = torch.full((WIDTH,), 3.0)


def around(direction: int, count: int, spread: float = 0.3, seed: int = 0) -> Tensor:
    """Return mean activations [count, WIDTH] around one axis of the space."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, WIDTH, generator=draw) * spread / math.sqrt(WIDTH)
    rows[:, direction] += 1
    return rows + CENTRE


def traffic(bank: SignatureBank, count: int = 200, attacks: int = 20) -> Traffic:
    """Benign spans around axes 0 to 7, attacks around axis 12."""
    benign = torch.cat([around(axis, count // 8, seed=axis) for axis in range(8)])
    return Traffic(bank.unit(benign), bank.unit(around(12, attacks, seed=99))[:attacks])


@pytest.fixture
def bank() -> SignatureBank:
    empty = SignatureBank(FINGERPRINT, Site.parse("resid.1"), CENTRE, 0.01)
    return replace(empty, traffic=traffic(empty))


def drafted(bank: SignatureBank, name: str = "a", kind: Kind = "injection", axis: int = 10, **more: Any) -> Signature:
    seed = more.pop("seed", 7)
    return draft(bank, name, kind, around(axis, more.pop("count", 5), seed=seed), "tests", **more)


def test_a_signature_of_a_handful_finds_others_of_its_kind(bank: SignatureBank) -> None:
    held, into = bank.added(drafted(bank))
    about = held.signatures[0].about
    assert into == "a"
    assert about.examples == 5
    assert about.trial is not None
    assert (about.trial.benign, about.trial.fired) == (200, 0)
    unseen = around(10, 40, seed=8)
    assert sum(bool(held.match(row)) for row in unseen) > 30
    assert not any(held.match(row) for row in around(3, 40, seed=9))
    match = held.match(unseen[0])[0]
    assert (match.id, match.kind, match.fires) == ("a", "injection", True)
    assert bank.signatures == ()


def test_without_the_centre_everything_is_alike() -> None:
    rows = torch.cat([around(axis, 4) for axis in range(8)])
    plain = torch.nn.functional.normalize(rows)
    assert (plain @ plain.T).min() > 0.9


def test_what_fires_on_everything_is_refused(bank: SignatureBank) -> None:
    poisoned = from_examples("p", "injection", bank.unit(around(10, 5)), "stranger", 0.99)
    with pytest.raises(
        BankError, match=r"p fires on \d+ of 200 benign spans, above the budget of 0\.01; --radius 0\.\d"
    ):
        bank.added(poisoned)
    ordinary = torch.cat([around(axis, 1, seed=5) for axis in range(8)])
    with pytest.raises(BankError, match="too like ordinary traffic"):
        draft(bank, "o", "injection", ordinary, "tests")
    uniform = replace(bank, traffic=Traffic(bank.unit(around(0, 1).repeat(200, 1)), bank.unit(around(12, 1))))
    with pytest.raises(BankError, match="it is like ordinary traffic, so choose other examples"):
        uniform.added(from_examples("o", "injection", bank.unit(around(0, 1)), "tests", 0.3))


def test_the_budget_is_for_the_whole_bank(bank: SignatureBank) -> None:
    traffic = bank.traffic
    assert traffic is not None
    # Each fires on the two benign spans that it is made of: all that 1% of 200 allows.
    one, other = (
        from_examples(name, "injection", traffic.benign_MD[rows], "tests", 0.01)
        for name, rows in (("one", slice(0, 1)), ("other", slice(30, 31)))
    )
    pairs = replace(bank, traffic=Traffic(traffic.benign_MD.repeat_interleave(2, 0)[:200], traffic.attacks_KD))
    for alone in (one, other):
        held, _ = pairs.added(alone)
        assert held.signatures[0].about.trial.fired == 2  # type: ignore[union-attr]
    held, _ = pairs.added(one)
    with pytest.raises(BankError, match="other fires on 2 of 200 benign spans and with the others of the bank on 4"):
        held.added(other)
    # What it fires on already costs nothing more.
    again = from_examples("again", "misuse", traffic.benign_MD[:1], "tests", 0.01)
    assert len(held.added(again)[0].signatures) == 2
    assert held.widest(other.vector_D, benign=False) == 0
    assert pairs.widest(other.vector_D, benign=False) > 0
    assert held.widest(other.vector_D, benign=True) > 0


def test_the_advice_would_do(bank: SignatureBank) -> None:
    wide = drafted(bank, radius=0.95)
    with pytest.raises(BankError, match="--radius") as caught:
        bank.added(wide)
    radius = float(str(caught.value).split("--radius ")[1].split()[0])
    held, _ = bank.added(drafted(bank, radius=radius))
    assert held.signatures[0].about.radius == radius


def test_a_look_alike_may_not_excuse_attacks(bank: SignatureBank) -> None:
    with pytest.raises(BankError, match=r"b would excuse \d+ of 20 known attacks"):
        bank.added(from_examples("b", "benign", bank.unit(around(12, 5)), "tests", 0.2))
    held, _ = bank.added(drafted(bank, axis=10))
    # A signature of the bank's own is a known attack as well.
    with pytest.raises(BankError, match="b would excuse 1 of 21 known attacks"):
        held.added(from_examples("b", "benign", bank.unit(around(10, 5, seed=3)), "tests", 0.2))
    with pytest.raises(BankError, match="too like ordinary traffic or an attack"):
        drafted(held, "b", "benign", axis=10, seed=3)
    held, _ = held.added(drafted(held, "c", "benign", axis=11))
    assert held.signatures[-1].about.trial.attacks == 21  # type: ignore[union-attr]
    without = replace(bank, traffic=traffic(bank, attacks=0))
    with pytest.raises(BankError, match="there are no attacks to try it on"):
        without.added(drafted(without, "c", "benign", axis=11))


def test_too_little_traffic_or_none(bank: SignatureBank) -> None:
    with pytest.raises(BankError, match=r"96 benign spans cannot show a rate of 0\.01; give 100 or more"):
        replace(bank, traffic=traffic(bank, 96)).added(drafted(bank))
    with pytest.raises(BankError, match="the bank holds no traffic"):
        replace(bank, traffic=None).added(drafted(bank))


def test_one_example_needs_a_radius(bank: SignatureBank) -> None:
    with pytest.raises(BankError, match="one example says nothing of a radius"):
        drafted(bank, count=1)
    assert drafted(bank, count=1, radius=0.1).about.radius == 0.1
    scattered = torch.cat([around(axis, 1) for axis in (8, 9, 10, 11, 13)])
    with pytest.raises(BankError, match=r"it would find [01] of 5 examples"):
        draft(bank, "s", "injection", scattered, "tests")


def test_near_duplicates_are_merged(bank: SignatureBank) -> None:
    held, _ = bank.added(drafted(bank, "a"))
    twin = replace(held.signatures[0], about=held.signatures[0].about.model_copy(update={"id": "b", "provenance": "x"}))
    both, into = held.added(twin)
    assert into == "a"
    assert len(both.signatures) == 1
    assert both.signatures[0].about.examples == 10
    assert both.signatures[0].about.provenance == "tests; x"
    assert held.added(held.signatures[0])[0].signatures == held.signatures
    # Another kind is no duplicate, and a name is taken once.
    other = replace(twin, about=twin.about.model_copy(update={"kind": "misuse"}))
    assert len(held.added(other)[0].signatures) == 2
    with pytest.raises(BankError, match="a is taken by another signature"):
        held.added(drafted(held, "a", axis=11))


def test_the_weight_of_a_merger_is_its_examples(bank: SignatureBank) -> None:
    one = from_examples("a", "injection", bank.unit(around(10, 9)), "x", 0.1)
    other = from_examples("b", "injection", bank.unit(around(11, 1)), "x", 0.3)
    both = merged(one, other)
    assert both.about.radius == 0.3
    assert both.vector_D @ one.vector_D > both.vector_D @ other.vector_D
    assert both.vector_D.norm().item() == pytest.approx(1)


def test_a_nearer_signature_hides_none_that_fires(bank: SignatureBank) -> None:
    """One is nearer and too narrow; the wider one, and the look-alike, still fire."""
    row = around(10, 1, spread=0.0)[0]
    held = bank
    for name, kind, angle, radius in (("near", "injection", 0.3, 0.01), ("wide", "injection", 0.5, 0.3),
                                      ("alike", "benign", 0.2, 0.1)):  # fmt: skip
        vector = torch.zeros(WIDTH)
        vector[10], vector[11 + len(held.signatures)] = math.cos(angle), math.sin(angle)
        made = from_examples(name, kind, vector[None], "tests", radius)  # type: ignore[arg-type]
        held = replace(held, signatures=(*held.signatures, made))
    assert [match.id for match in held.match(row)] == ["alike", "wide"]
    nearest = held.nearest(row)
    assert nearest is not None
    assert (nearest.id, nearest.fires) == ("near", False)


def test_what_fires_is_what_each_radius_says(bank: SignatureBank) -> None:
    draw = torch.Generator().manual_seed(0)
    made = [
        from_examples(
            f"{number}",
            "benign" if number % 3 == 0 else "injection",
            torch.nn.functional.normalize(torch.randn(1, WIDTH, generator=draw)),
            "tests",
            (number % 60 + 1) / 100,
        )
        for number in range(60)
    ]
    held, fired = replace(bank, signatures=tuple(made)), 0
    for row_D in torch.randn(200, WIDTH, generator=draw):
        unit_D, matches = held.unit(row_D[None])[0], held.match(row_D)
        for benign in (False, True):
            side = [item for item in made if item.benign == benign]
            margins = [float(unit_D @ item.vector_D.bfloat16().float()) - 1 + item.about.radius for item in side]
            found = [match for match in matches if (match.kind == "benign") == benign]
            assert len(found) == (max(margins) >= 0)
            if found:
                assert found[0].id == side[margins.index(max(margins))].about.id
                assert found[0].fires
            fired += len(found)
    assert 50 < fired < 350


def test_an_empty_span_and_an_empty_bank(bank: SignatureBank) -> None:
    away = from_examples("away", "injection", -torch.nn.functional.normalize(CENTRE, dim=0)[None], "tests", 0.1)
    held = replace(bank, signatures=(away,))
    assert held.match(torch.full((WIDTH,), 1e-3))
    assert held.match(torch.zeros(WIDTH)) == []
    assert bank.match(around(10, 1)[0]) == []
    assert bank.nearest(around(10, 1)[0]) is None


def test_new_traffic_tries_everything_again(bank: SignatureBank) -> None:
    held, _ = bank.added(drafted(bank, axis=10))
    again = with_traffic(held, traffic(held))
    assert [item.about.id for item in again.signatures] == ["a"]
    worse = Traffic(held.unit(around(10, 200, seed=4)), held.unit(around(12, 3)))
    with pytest.raises(BankError, match="a fires on"):
        with_traffic(held, worse)


def test_a_folder_of_it(bank: SignatureBank, tmp_path: Path) -> None:
    held, _ = bank.added(drafted(bank))
    held.save_pretrained(tmp_path / "bank")
    read = SignatureBank.from_pretrained(tmp_path / "bank")
    row = around(10, 1, seed=8)[0]
    assert read.match(row) == held.match(row)
    assert read.traffic is not None
    assert read.signatures[0].about == held.signatures[0].about
    assert read.added(drafted(read, "b", axis=11))[1] == "b"
    bank.save_pretrained(tmp_path / "empty")
    assert SignatureBank.from_pretrained(tmp_path / "empty").signatures == ()
    removed = read.without(["a"])
    assert removed.signatures == ()
    with pytest.raises(BankError, match="no signature 'z'; Known: a"):
        read.without(["z"])


def spoil(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the vectors and make the digests fit again, as whoever poisons a bank would."""
    tensors = load_file(folder / "signatures.safetensors")
    change(tensors)
    save_file(tensors, folder / "signatures.safetensors")
    manifest = json.loads((folder / "signatures.json").read_text())
    manifest["vectors_digest"] = sha256(folder / "signatures.safetensors")
    (folder / "signatures.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(vectors=t["vectors"] * 40), "a signature has length 40, not 1"),
        (lambda t: t.update(vectors=t["vectors"] * 0), "a signature has length 0, not 1"),
        (lambda t: t.update(vectors=t["vectors"] * math.nan), "not finite"),
        (lambda t: t.update(vectors=t["vectors"][:, :5].clone()), r"vectors is \[1, 5\], the manifest says \[1, 16\]"),
        (lambda t: t.update(vectors=t["vectors"].repeat(2, 1)), r"vectors is \[2, 16\]"),
        (lambda t: t.pop("centre"), r"centre is \[0\], the manifest says \[1, 16\]"),
    ],
)
def test_poisoned_or_damaged_vectors(bank: SignatureBank, tmp_path: Path, change: Any, message: str) -> None:
    bank.added(drafted(bank))[0].save_pretrained(tmp_path / "bank")
    spoil(tmp_path / "bank", change)
    with pytest.raises(BankError, match=message):
        SignatureBank.from_pretrained(tmp_path / "bank")


@pytest.mark.parametrize(
    ("field", "value"), [("radius", 1.5), ("radius", 0.123), ("kind", "good"), ("id", "a b"), ("provenance", "x" * 201)]
)
def test_a_manifest_that_says_something_else(bank: SignatureBank, tmp_path: Path, field: str, value: Any) -> None:
    bank.added(drafted(bank))[0].save_pretrained(tmp_path / "bank")
    path = tmp_path / "bank" / "signatures.json"
    manifest = json.loads(path.read_text())
    manifest["signatures"][0][field] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(BankError, match=rf"signatures\.0\.{field}"):
        SignatureBank.from_pretrained(tmp_path / "bank")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    pytest.importorskip("model_signing")
    pytest.importorskip("OpenSSL", reason="model-signing imports it")
    from spider_sense.signing import generate_keys

    return generate_keys(tmp_path / "alice")


def test_signatures_are_exchanged_without_traffic(bank: SignatureBank, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    held, _ = bank.added(drafted(bank))
    held, _ = held.added(drafted(held, "b", axis=11))
    assert export_signatures(held, tmp_path / "out", keys[0], ["a"]) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model.sig",
        "signatures.json",
        "signatures.safetensors",
    ]
    taken, results = import_signatures(bank, tmp_path / "out", keys[1])
    assert [(item.id, item.refused) for item in results] == [("a", None)]
    assert taken.match(around(10, 1, seed=8)[0])
    with pytest.raises(BankError, match="no signature to export"):
        export_signatures(bank, tmp_path / "none", keys[0])


def test_what_is_imported_is_tried_here(bank: SignatureBank, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    """The stranger's own trial says that all is well."""
    good, poisoned = drafted(bank, "good"), from_examples("bad", "injection", bank.unit(around(9, 5)), "stranger", 0.99)
    excuse = from_examples("excuse", "benign", bank.unit(around(12, 5)), "stranger", 0.2)
    theirs = replace(bank, signatures=(poisoned, good, excuse))
    export_signatures(theirs, tmp_path / "out", keys[0])
    taken, results = import_signatures(bank, tmp_path / "out", keys[1])
    assert [item.refused is None for item in results] == [False, True, False]
    assert "above the budget" in str(results[0].refused)
    assert "would excuse" in str(results[2].refused)
    assert [item.about.id for item in taken.signatures] == ["good"]


def test_imports_move_no_signature_of_the_banks_own(
    bank: SignatureBank, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    """Each is a near-duplicate of the one before, and says that a million examples made it."""
    held, _ = bank.added(drafted(bank))
    own, away = held.signatures[0], bank.unit(around(15, 1))[0]
    walked = own.vector_D
    for step in range(9):
        walked = torch.nn.functional.normalize(walked + 0.15 * away, dim=0)
        step_1D = walked[None]
        made = from_examples(f"s{step}", own.about.kind, step_1D, "stranger", 0.1)
        claimed = replace(made, about=made.about.model_copy(update={"examples": 10**6}))
        export_signatures(replace(bank, signatures=(claimed,)), tmp_path / f"out{step}", keys[0])
        held, results = import_signatures(held, tmp_path / f"out{step}", keys[1])
        assert results[0].refused is None
    assert walked @ own.vector_D < 0.9
    assert held.signatures[0].about == own.about
    assert held.signatures[0].vector_D.equal(own.vector_D)
    # Nor does what the operator adds later disappear in one of them.
    beside = from_examples("mine", own.about.kind, walked[None], "tests", 0.1)
    assert held.added(beside)[1] == "mine"
    # The same once more is no other signature, and a name stays with what has it.
    assert import_signatures(held, tmp_path / "out8", keys[1])[0].signatures == held.signatures
    named = replace(beside, about=beside.about.model_copy(update={"id": "a"}))
    export_signatures(replace(bank, signatures=(named,)), tmp_path / "named", keys[0])
    assert "a is taken" in str(import_signatures(held, tmp_path / "named", keys[1])[1][0].refused)


def test_what_is_not_signed_or_not_for_this_model_is_not_imported(
    bank: SignatureBank, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    held, _ = bank.added(drafted(bank))
    export_signatures(held, tmp_path / "out", keys[0])
    for other, message in (
        (replace(bank, fingerprint=FINGERPRINT.model_copy(update={"weight_digest": "v"})), "weight_digest is 'w'"),
        (replace(bank, site=Site.parse("resid.0")), r"signatures at resid\.1, expected resid\.0"),
        (replace(bank, centre_D=CENTRE * 1.5), "the centres of the two banks lie"),
    ):
        with pytest.raises(MismatchError, match=message):
            import_signatures(other, tmp_path / "out", keys[1])
    spoil(tmp_path / "out", lambda tensors: tensors.update(vectors=-tensors["vectors"]))
    with pytest.raises(SignatureError, match="Hash mismatch"):
        import_signatures(bank, tmp_path / "out", keys[1])
    held.save_pretrained(tmp_path / "unsigned")
    with pytest.raises(SignatureError, match="is not signed"):
        import_signatures(bank, tmp_path / "unsigned", keys[1])
