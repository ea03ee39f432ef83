"""Old module paths and names still work, with a warning that names the new ones."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import import_module

import pytest

import unclip
from unclip import _deprecated


def find(path: str):
    owner, _, name = path.rpartition(".")
    return getattr(import_module(owner), name)


@pytest.mark.parametrize(("old", "new"), _deprecated.MODULES.items())
def test_an_old_module_path_gives_the_members_of_the_new_module(old, new):
    module = import_module(new)
    name = next(
        name
        for name, member in vars(module).items()
        if str(getattr(member, "__module__", "")).startswith(new)
        and not name.startswith("_")
        and f"{old}.{name}" != new
    )
    with pytest.warns(DeprecationWarning, match=new.replace(".", r"\.")):
        assert find(f"{old}.{name}") is getattr(module, name)


@pytest.mark.parametrize(("old", "new"), _deprecated.NAMES.items())
def test_an_old_name_gives_the_object_of_the_new_name(old, new):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_module(old.rpartition(".")[0])
    with pytest.warns(DeprecationWarning, match=new.replace(".", r"\.")):
        assert find(old) is find(new)


def test_unknown_names_of_a_moved_module_are_errors():
    with pytest.warns(DeprecationWarning), pytest.raises(ImportError, match="no_such_name"):
        sys.modules.pop("unclip.pictures", None)
        from unclip.pictures import no_such_name  # noqa: F401
    with pytest.raises(AttributeError, match="no_such_name"):
        unclip.no_such_name  # noqa: B018


def test_the_warning_points_to_the_importing_line(tmp_path):
    script = tmp_path / "old.py"
    script.write_text("import unclip\nfrom unclip.pictures import grid\n")
    output = subprocess.run(
        [sys.executable, "-W", "always", script], capture_output=True, text=True, check=True
    ).stderr
    assert f"{script}:2: DeprecationWarning: unclip.pictures is deprecated" in output
