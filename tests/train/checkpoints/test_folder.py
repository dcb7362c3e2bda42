"""Which checkpoints stay, in which order they are tried, and that one more appears in one step."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencoca.train.checkpoints.folder import CheckpointFolder, CheckpointName, names_to_keep
from opencoca.train.recipe.safety import CheckpointRecipe

NAMES = st.builds(CheckpointName, st.integers(0, 60), st.integers(0, 2))


def publish(folder: CheckpointFolder, step: int, content: str = "") -> CheckpointName:
    partial = folder.partial(step, f"attempt{content}")
    partial.mkdir(parents=True)
    (partial / "index.json").write_text(content)
    return folder.publish(partial, step)


@given(st.sets(NAMES), NAMES, st.integers(1, 5), st.none() | st.integers(1, 20), st.booleans(), st.integers(0, 60))
def test_what_stays(names, newest, keep_last, keep_every_steps, keep_best, best_step) -> None:
    names |= {newest}
    options = CheckpointRecipe(keep_last=keep_last, keep_every_steps=keep_every_steps, keep_best=keep_best)
    kept = names_to_keep(names, newest, options, best_step)
    assert newest in kept <= names
    assert max(kept) == newest  # whoever continues, continues from here
    earlier = {name.step for name in names if name.step < newest.step}
    assert len(kept) >= min(keep_last, len(earlier) + 1)
    # The very last ones, each step's last.
    assert {name.step for name in kept} >= set(sorted(earlier)[len(earlier) - keep_last + 1 :] if keep_last > 1 else ())
    assert all(name.number == max(n.number for n in names if n.step == name.step) for name in kept - {newest})
    if keep_best and best_step in earlier:
        assert best_step in {name.step for name in kept}
    if keep_every_steps is None and not keep_best:
        assert len(kept) == min(keep_last, len(earlier) + 1)


def test_every_kth_stays_as_they_come() -> None:
    options = CheckpointRecipe(keep_last=2, keep_every_steps=10)
    names: set[CheckpointName] = set()
    for step in (3, 7, 12, 14, 19, 20, 23, 41, 44, 46, 48):
        names.add(CheckpointName(step))
        names = names_to_keep(names, CheckpointName(step), options, 0)
    assert sorted(name.step for name in names) == [12, 20, 41, 46, 48]


def test_names_and_latest(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert folder.names() == folder.to_try() == []
    assert str(publish(folder, 5)) == "step-00000005"
    assert str(publish(folder, 11)) == "step-00000011"
    assert str(publish(folder, 5, "again")) == "step-00000005.1"
    assert (folder.path / "step-00000005" / "index.json").read_text() == ""  # as it was
    assert folder.latest_path.read_text() == "step-00000005.1\n"
    assert [str(name) for name in folder.to_try()] == ["step-00000005.1", "step-00000011", "step-00000005"]
    for text in ("", "step-00000099", "\0\xff", "../elsewhere"):
        folder.latest_path.write_text(text)
        assert [str(name) for name in folder.to_try()] == ["step-00000011", "step-00000005.1", "step-00000005"]
    folder.latest_path.unlink()
    assert len(folder.to_try()) == 3


def test_a_folder_without_an_index_is_none_but_its_name_is_taken(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000007").write_text("a file")
    assert folder.names() == []
    assert str(publish(folder, 5)) == "step-00000005.1"


def test_leftovers_go_and_nothing_else(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.remove_leftovers()
    publish(folder, 5)
    (folder.partial(6, "killed")).mkdir()
    (folder.partial(6, "killed") / "rank-00000.safetensors").write_text("half")
    (folder.path / "notes.txt").write_text("mine")
    (folder.path / ".latest.1-2.partial").write_text("half")
    folder.remove_leftovers()
    assert sorted(entry.name for entry in folder.path.iterdir()) == ["latest", "notes.txt", "step-00000005"]


def test_pruning_that_is_interrupted_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch) -> None:
    folder = CheckpointFolder(tmp_path)
    names = [publish(folder, step) for step in (1, 2, 3)]

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.prune(names[-1], CheckpointRecipe(keep_last=1), 0)
    monkeypatch.undo()
    assert folder.names() in ([names[1], names[2]], [names[0], names[2]])
    folder.remove_leftovers()
    folder.prune(names[-1], CheckpointRecipe(keep_last=1), 0)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step-00000003"]
