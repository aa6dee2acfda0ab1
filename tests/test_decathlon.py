"""dataset.json: pairs of files, or every reason why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_listing

from data_cache.errors import DataSetError
from data_cache.schema import DataSetInfo
from pipeline.decathlon import read_data_set, volume_stem


def entry(name: str) -> dict[str, str]:
    return {"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"}


def listing(root: Path, content: Any) -> Path:
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def test_a_listing_is_read(tmp_path: Path) -> None:
    training = [entry("liver_1.nii.gz"), entry("liver_0.nii")]
    data_set = read_data_set(
        listing(tmp_path, {"name": "LIVER", "training": training, "test": ["./imagesTs/liver_2.nii.gz"]})
    )
    assert data_set.info == DataSetInfo(name="LIVER", licence=None, description=None, phantom=False)
    assert [case.case_id for case in data_set.cases] == ["liver_1", "liver_0"]
    assert data_set.cases[0].image == tmp_path / "imagesTr/liver_1.nii.gz"
    assert data_set.cases[0].label == tmp_path / "labelsTr/liver_1.nii.gz"
    assert data_set.tests == (tmp_path / "imagesTs/liver_2.nii.gz",)
    assert data_set.unlisted == ()


def test_files_need_not_exist_and_test_may_be_absent(tmp_path: Path) -> None:
    write_listing(tmp_path, ["liver_0"])
    content = json.loads((tmp_path / "dataset.json").read_text())
    del content["test"], content["name"]
    data_set = read_data_set(listing(tmp_path, content))
    assert (data_set.info.name, data_set.tests) == (tmp_path.name, ())


@pytest.mark.parametrize(
    ("said", "licence", "phantom"),
    [
        ({"licence": " CC-BY-SA 4.0 "}, "CC-BY-SA 4.0", False),
        ({"license": "CC0"}, "CC0", False),
        ({"licence": "", "license": "CC0"}, "CC0", False),
        ({"licence": None}, None, False),
        ({"licence": 4}, "4", False),
        ({"description": "Synthetic livers"}, None, True),
        ({"name": "XCAT phantoms"}, None, True),
    ],
)
def test_what_a_data_set_says_of_itself(
    tmp_path: Path, said: dict[str, Any], licence: str | None, phantom: bool
) -> None:
    write_listing(tmp_path, ["liver_0"], **said)
    info = read_data_set(tmp_path).info
    assert (info.licence, info.phantom) == (licence, phantom)


def test_our_own_phantoms_say_that_they_are_phantoms(phantoms: Path) -> None:
    info = read_data_set(phantoms).info
    assert (info.phantom, info.licence) == (True, "CC0 1.0")


def test_every_fault_is_listed(tmp_path: Path) -> None:
    training = [
        entry("liver_0.nii.gz"),
        {"image": "./imagesTr/liver_1.nii.gz"},
        "./imagesTr/liver_2.nii.gz",
        {"image": 3, "label": 4},
        entry("liver_0.nii.gz"),
    ]
    with pytest.raises(DataSetError) as caught:
        read_data_set(listing(tmp_path, {"training": training, "test": 5}))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'dataset.json'}: ")
    for fault in (
        "{'image': './imagesTr/liver_1.nii.gz'} has no image and label",
        "'./imagesTr/liver_2.nii.gz' has no image and label",
        "{'image': 3, 'label': 4} has no image and label",
        "'test' is no list of cases",
        "lists the case 'liver_0' 2 times",
    ):
        assert fault in message
    assert "\n" not in message


def test_a_name_that_is_no_case_id_costs_its_own_case_alone(tmp_path: Path) -> None:
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr" / "liver 4.nii.gz").touch()
    odd = ("scan.mha", "._liver_3.nii.gz", "liver 4.nii.gz", "zarr.json.nii")
    data_set = read_data_set(
        listing(tmp_path, {"training": [entry(name) for name in ("liver_0.nii.gz", *odd)]})
    )
    assert [case.case_id for case in data_set.cases] == ["liver_0"]
    assert [case.image.name for case in data_set.misnamed] == list(odd)
    assert data_set.unlisted == ()
    with pytest.raises(
        DataSetError, match=r"liver 4.nii.gz does not name a case .*: rename it, in dataset.json"
    ):
        read_data_set(listing(tmp_path, {"training": [entry(name) for name in odd]}))


@pytest.mark.parametrize("names", [("a.nii", "a.nii.gz"), ("a.nii.gz", "a.nii.gz")])
def test_two_files_of_one_case_id_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    with pytest.raises(DataSetError, match="lists the case 'a' 2 times"):
        read_data_set(listing(tmp_path, {"training": [entry(name) for name in names]}))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({}, "'training' is no list of cases"),
        ({"training": None}, "'training' is no list of cases"),
        ({"training": {}}, "'training' is no list of cases"),
        ({"training": []}, "lists no training case"),
        ([], "holds a list, not an object"),
        ("text", "holds a str, not an object"),
    ],
)
def test_what_lists_no_case_is_refused(tmp_path: Path, content: Any, fault: str) -> None:
    with pytest.raises(DataSetError, match=fault):
        read_data_set(listing(tmp_path, content))


def test_what_is_no_data_set_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(DataSetError, match="nowhere: no such folder"):
        read_data_set(tmp_path / "nowhere")
    with pytest.raises(DataSetError, match="has no dataset.json: name the folder of a Decathlon task"):
        read_data_set(tmp_path)
    (tmp_path / "dataset.json").write_bytes(b'{"training": [\xff')
    with pytest.raises(DataSetError, match="dataset.json: unreadable"):
        read_data_set(tmp_path)
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "dataset.json").mkdir()
    with pytest.raises(DataSetError, match="dataset.json: unreadable"):
        read_data_set(tmp_path)


def test_images_that_are_not_listed_are_told_and_litter_is_not(tmp_path: Path) -> None:
    (tmp_path / "imagesTr").mkdir()
    for name in (
        "liver_0.nii.gz",
        "._liver_0.nii.gz",
        "liver_7.nii.gz",
        "liver_8.nii",
        ".DS_Store",
        "notes.txt",
    ):
        (tmp_path / "imagesTr" / name).touch()
    write_listing(tmp_path, ["liver_0"])
    assert [path.name for path in read_data_set(tmp_path).unlisted] == ["liver_7.nii.gz", "liver_8.nii"]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("liver_0.nii.gz", "liver_0"),
        ("liver_0.nii", "liver_0"),
        ("a.b.nii.gz", "a.b"),
        ("._liver_0.nii.gz", None),
        (".nii.gz", None),
        ("liver_0.gz", None),
        ("liver_0.mha", None),
    ],
)
def test_stems(name: str, stem: str | None) -> None:
    assert volume_stem(Path("x") / name) == stem
