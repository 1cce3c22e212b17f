"""The table of the catalog: what it lists, and that the files at hand are the ones it means."""

import re

import pytest

from braidlora import catalog
from braidlora.catalog._build import _INSTRUCTIONS, BUILDERS
from braidlora.catalog._facts import _table
from braidlora.catalog._find import local_place, mismatch
from braidlora.config import built_in_recipes, load_config, schema_of
from braidlora.errors import ConfigError
from helpers.data import data_path

FILES = _table()[1]


def test_every_part_is_a_file_of_the_catalog_and_every_file_can_be_had_or_is_told_apart():
    for one in catalog.data_sets().values():
        assert one.about
        assert set(one.parts) <= {"train", "test"}
        for part in one.parts.values():
            assert part.file in FILES
    for file in FILES.values():
        assert file.origin in ("download", "build"), file.name
        assert file.license
        assert all(name in FILES for name in file.inputs)
        assert (file.build is None) == (not file.inputs)
        assert file.build is None or file.build in BUILDERS


@pytest.mark.parametrize("file", [file for file in FILES.values() if file.url], ids=lambda file: file.name)
def test_a_public_address_is_of_one_commit_and_its_content_is_recorded(file):
    assert re.match(r"https://raw\.githubusercontent\.com/[\w.-]+/[\w.-]+/[0-9a-f]{40}/", file.url)
    assert re.fullmatch("[0-9a-f]{64}", file.sha256 or "") or re.fullmatch(
        "[0-9a-f]{40}", file.git_blob or ""
    )


@pytest.mark.parametrize("name", FILES)
def test_the_file_in_the_data_folder_is_the_one_in_the_catalog(name):
    file = FILES[name]
    if "/original/" not in name and file.sha256 is not None:
        assert mismatch(file, data_path(*name.split("/"))) is None
    elif (place := local_place(file)) is not None and place.is_file():
        assert mismatch(file, place) is None


@pytest.mark.parametrize("name", built_in_recipes())
def test_recipes_name_their_data_by_key(name):
    config = load_config(name, [], schema_of(name))
    sources = [
        source.source for task in config.tasks for source in (task.train, task.test) if source is not None
    ]
    assert all(source.startswith((catalog.PREFIX, "generated:")) for source in sources)
    text = built_in_recipes()[name].read_text(encoding="utf-8")
    assert not re.search(r"\.\./|shared/|(source|train|test|path): (data|models)/", text)


def test_an_unknown_key_is_answered_with_similar_ones():
    with pytest.raises(
        ConfigError, match=r"no dataset 'flan8/snil' in the catalog\. Did you mean flan8/snli"
    ):
        catalog.data_set("flan8/snil")


def test_the_instructions_are_of_the_tasks_in_the_catalog():
    keys = {key.removeprefix("induction/") for key in catalog.data_sets() if key.startswith("induction/")}
    assert keys == set(_INSTRUCTIONS)
