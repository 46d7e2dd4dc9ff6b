"""The store: what is put is read back to the bit, damage is told apart from novelty, nothing is silently rebuilt."""

import json
import math
import os
import sqlite3

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.theory import cells as cells_module
from preflab.theory import store as store_module
from preflab.theory.cells import Cell, canonical, decode, encode, resolve
from preflab.theory.store import FILE, SCHEMA, DamagedStore, Store, StoreError


def cell(seed=0, **parameters):
    return Cell("claims._selftest:draw", parameters, seed)


# ---- cells and their JSON ------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
names = st.text().filter(lambda s: not s.startswith("$"))
trees = st.recursive(scalars, lambda x: st.lists(x) | st.dictionaries(names, x), max_leaves=6)


def in_order(value):
    if isinstance(value, dict):
        return {name: in_order(value[name]) for name in sorted(value)}
    return [in_order(item) for item in value] if isinstance(value, list) else value


@given(trees)
def test_every_value_survives_json_to_the_bit(value):
    again = decode(json.loads(canonical(value)))
    assert repr(in_order(again)) == repr(in_order(value))


def test_numpy_becomes_plain():
    assert encode({"a": np.arange(2), "b": np.float64(0.1), "c": (np.bool_(True),)}) == {
        "a": [0, 1],
        "b": 0.1,
        "c": [True],
    }


@pytest.mark.parametrize(
    ("value", "place"),
    [({"a": [1, {2}]}, r"result\['a'\]\[1\] is a set"), ({1: 2}, "key 1"), ({"$float": 1}, r"'\$float'")],
)
def test_what_json_cannot_hold_is_named(value, place):
    with pytest.raises(TypeError, match=place):
        encode(value)


def test_a_key_depends_on_all_that_the_result_depends_on(monkeypatch):
    base = cell(1, n=3)
    assert base.key == cell(np.int64(1), n=np.int64(3)).key
    assert base == cell(1, n=3)
    assert len({base, cell(1, n=3)}) == 1
    others = {cell(2, n=3), cell(1, n=4), cell(1), Cell("claims._selftest:threads", {"n": 3}, 1)}
    assert base not in others
    assert len(others) == 4
    assert base != base.key
    monkeypatch.setattr(cells_module, "code_fingerprint", lambda: "edited")
    assert cell(1, n=3) != base


def test_the_order_of_parameters_does_not_matter():
    assert cell(n=3, pause=0.0) == cell(pause=0.0, n=3)
    assert str(cell(n=3, pause=0.0)) == "claims._selftest:draw(n=3, pause=0.0, seed=0)"


def test_edited_source_changes_the_fingerprint(monkeypatch, tmp_path):
    package = tmp_path / "envs"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    module = type("Module", (), {"__file__": str(package / "__init__.py"), "__name__": "envs"})
    monkeypatch.setattr(cells_module.importlib, "import_module", lambda *_: module)
    fresh = cells_module.code_fingerprint.__wrapped__
    before = fresh()
    assert fresh() == before
    (package / "__init__.py").write_text("x = 2\n")
    edited = fresh()
    (package / "data" / "table.npz").write_bytes(b"1")
    (package / "ignored.txt").write_text("x")
    assert len({before, edited, fresh()}) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os:system", "no module preflab.theory.os"),
        ("claims._selftest:np", "defines no function np"),
        ("cells:importlib", "defines no function importlib"),
        ("store:sqlite3", "defines no function"),
        ("claims._selftest:missing", "defines no function missing"),
        ("claims._selftest:os.system", "not of the form"),
        ("..os:system", "not of the form"),
        (3, "not of the form"),
    ],
)
def test_only_functions_of_the_package_can_be_named(name, message):
    with pytest.raises(ValueError, match=message):
        resolve(name)


def test_a_module_that_lacks_a_dependency_says_so_itself(monkeypatch):
    def lacking(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(cells_module.importlib, "import_module", lacking)
    with pytest.raises(ModuleNotFoundError, match="torch"):
        resolve("claims.needs_torch:f")


@pytest.mark.parametrize("seed", [-1, 1.5, True, None])
def test_a_seed_is_a_natural_number(seed):
    with pytest.raises(ValueError, match="seed is"):
        cell(seed)


def test_the_seed_is_not_a_parameter():
    with pytest.raises(ValueError, match="not as a parameter"):
        Cell("claims._selftest:draw", {"seed": 1}, 0)


def test_a_cell_is_pure_and_returns_a_dict():
    assert repr(cell(3, n=2).run()) == repr(cell(3, n=2).run())
    assert math.isnan(cell(3).run()["odd"][0])
    with pytest.raises(TypeError, match="returned a int"):
        Cell("claims._selftest:not_a_dict", {}, 1).run()


# ---- the store ---------------------------------------------------------------------------------------------


def test_what_is_put_is_read_back_also_by_the_next_process(tmp_path):
    one = cell(1)
    result = one.run()
    with Store.open(tmp_path / "new" / "folder") as store:
        assert one not in store
        assert store.get(one) is None
        assert store.put(one, result, 1.5)
        assert not store.put(one, {"x": "another"}, 2.0)
        store.note("request", {"claims": ["a"]})
        store.note("request", {"claims": ["b"]})
    with Store.open(tmp_path / "new" / "folder") as store:
        assert one in store
        assert len(store) == 1
        assert canonical(store.get(one).result) == canonical(result)
        assert store.get(one).seconds == 1.5
        assert store.missing([one, cell(2), cell(2)]) == [cell(2)]
        assert store.noted("request") == {"claims": ["b"]}
        assert store.noted("nothing") is None
        assert store.table()[0][:2] == (one.key, "claims._selftest:draw")
    assert os.listdir(tmp_path / "new" / "folder") == [FILE]


def filled(folder, n=40):
    with Store.open(folder) as store:
        for seed in range(n):
            store._connection.execute("PRAGMA synchronous = OFF")
            store.put(cell(seed, n=30), cell(seed, n=30).run(), 0.0)
    return folder / FILE


def no_header(path):
    path.write_bytes(b"not a database at all" * 100)


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def scrambled(path):
    data = bytearray(path.read_bytes())
    data[4096:12288] = bytes(i * 37 % 256 for i in range(8192))
    path.write_bytes(bytes(data))


def without_table(path):
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE cells")
    connection.close()


def without_column(path):
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE cells RENAME COLUMN digest TO other")
    connection.close()


def flipped(path):
    data = path.read_bytes()
    assert b'"odd"' in data
    path.write_bytes(data.replace(b'"odd"', b'"odc"', 1))


def not_text(path):
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE cells SET result = NULL WHERE seed = -1")
        connection.execute("UPDATE cells SET result = x'ff' WHERE seed = 1")
    connection.close()


@pytest.mark.parametrize(
    "damage", [no_header, truncated, emptied, scrambled, without_table, without_column, flipped, not_text]
)
def test_a_damaged_store_is_reported_and_set_aside_and_not_rebuilt(tmp_path, damage):
    path = filled(tmp_path)
    damage(path)
    left = path.read_bytes()
    with pytest.raises(DamagedStore, match=r"set aside as store.damaged-.*nothing was rebuilt") as caught:
        Store.open(tmp_path)
    assert not path.exists()
    assert caught.value.aside.parent == tmp_path
    assert caught.value.aside.read_bytes() == left
    with Store.open(tmp_path) as store:  # the user's next run starts afresh
        assert len(store) == 0
    assert caught.value.aside.exists()


def test_two_damaged_stores_of_one_second_both_stay(tmp_path):
    kept = set()
    for i in range(3):
        (tmp_path / FILE).write_bytes(b"garbage %d" % i * 200)
        with pytest.raises(DamagedStore) as caught:
            Store.open(tmp_path)
        kept.add(caught.value.aside)
    assert len(kept) == 3


def test_the_journal_of_a_damaged_store_cannot_meet_the_next_one(tmp_path):
    (tmp_path / FILE).write_bytes(b"store")
    (tmp_path / f"{FILE}-journal").write_bytes(b"journal")
    aside = store_module._set_aside(tmp_path / FILE)
    assert sorted(os.listdir(tmp_path)) == [aside.name, f"{aside.name}-journal"]


def test_a_newer_store_is_left_as_it_is(tmp_path):
    path = filled(tmp_path, 1)
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"newer preflab.*upgrade"):
        Store.open(tmp_path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [FILE]


def test_somebody_elses_database_is_left_as_it_is(tmp_path):
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("CREATE TABLE cells (x)")
    connection.close()
    with pytest.raises(StoreError, match="not preflab's"):
        Store.open(tmp_path)
    assert os.listdir(tmp_path) == [FILE]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write to .*Choose another folder"):
        Store.open(tmp_path / "file" / "out")


def test_a_folder_without_results_is_not_made_by_looking(tmp_path):
    with pytest.raises(StoreError, match="holds no results"):
        Store.open(tmp_path / "nowhere", create=False)
    assert not (tmp_path / "nowhere").exists()


def test_a_store_that_is_a_folder_is_an_error_and_not_damage(tmp_path):
    (tmp_path / FILE).mkdir()
    with pytest.raises(StoreError, match="unable to open") as caught:
        Store.open(tmp_path)
    assert not isinstance(caught.value, DamagedStore)


def test_a_busy_store_is_an_error_and_not_damage(tmp_path, monkeypatch):
    path = filled(tmp_path, 1)
    monkeypatch.setattr(store_module, "BUSY_SECONDS", 0.01)
    other = sqlite3.connect(path)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError, match="locked") as caught:
        Store.open(tmp_path)
    assert not isinstance(caught.value, DamagedStore)
    other.close()


def test_a_store_that_breaks_while_in_use_says_so(tmp_path):
    path = filled(tmp_path, 1)
    with Store.open(tmp_path) as store:
        without_table(path)
        with pytest.raises(StoreError, match="broke while in use"):
            len(store)


def test_where_there_are_no_hard_links_a_store_is_renamed_into_place(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_links)
    with Store.open(tmp_path) as store:
        assert len(store) == 0
    assert os.listdir(tmp_path) == [FILE]


@pytest.mark.parametrize("links", [True, False])
def test_a_store_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch, links):
    path = filled(tmp_path, 1)
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("not supported")))
    store_module._create(path)
    with Store.open(tmp_path) as store:
        assert len(store) == 1


def test_an_interruption_while_checking_closes_the_store(tmp_path, monkeypatch):
    filled(tmp_path, 1)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store_module, "_check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Store.open(tmp_path)
