"""dataset.json: pairs of files, or every reason why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_listing

from data_cache.errors import DataSetError
from data_cache.schema import DataSetInfo
from pipeline.decathlon import read_data_set
from pipeline.dialects import label_meanings
from pipeline.listing import check_listing
from pipeline.names import volume_stem


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
        {"image": "a\0.nii.gz", "label": "a.nii.gz"},
        entry("liver_0.nii.gz"),
    ]
    with pytest.raises(DataSetError) as caught:
        read_data_set(listing(tmp_path, {"training": training, "test": 5}))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'dataset.json'}: ")
    for fault in (
        "{'image': './imagesTr/liver_1.nii.gz'} does not name one image and one label",
        "'./imagesTr/liver_2.nii.gz' does not name one image and one label",
        "{'image': 3, 'label': 4} does not name one image and one label",
        r"{'image': 'a\x00.nii.gz', 'label': 'a.nii.gz'} does not name one image and one label",
        "'test' is not a list of cases",
        "lists the case 'liver_0' 2 times",
    ):
        assert fault in message
    assert "\n" not in message


def test_a_name_that_is_no_case_id_costs_its_own_case_alone(tmp_path: Path) -> None:
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr" / "liver 4.nii.gz").touch()
    # A longer name than a folder can have failed where the cache was asked for it, and took all cases with it.
    odd = ("scan.mha", "._liver_3.nii.gz", "liver 4.nii.gz", "zarr.json.nii", "x" * 300 + ".nii.gz")
    data_set = read_data_set(
        listing(tmp_path, {"training": [entry(name) for name in ("liver_0.nii.gz", *odd)]})
    )
    assert [case.case_id for case in data_set.cases] == ["liver_0"]
    assert [case.image.name for case in data_set.misnamed] == list(odd)
    assert data_set.unlisted == ()
    with pytest.raises(
        DataSetError, match=r"liver 4.nii.gz is not a case name: .*: rename it, also in dataset.json"
    ):
        read_data_set(listing(tmp_path, {"training": [entry(name) for name in odd]}))


@pytest.mark.parametrize("names", [("a.nii", "a.nii.gz"), ("a.nii.gz", "a.nii.gz")])
def test_two_files_of_one_case_id_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    with pytest.raises(DataSetError, match="lists the case 'a' 2 times"):
        read_data_set(listing(tmp_path, {"training": [entry(name) for name in names]}))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({}, "'training' is not a list of cases"),
        ({"training": None}, "'training' is not a list of cases"),
        ({"training": {}}, "'training' is not a list of cases"),
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
        ("A.NII.GZ", "A"),
        ("A.Nii", "A"),
        ("a.b.nii.gz", "a.b"),
        ("._liver_0.nii.gz", None),
        (".nii.gz", None),
        ("liver_0.gz", None),
        ("liver_0.mha", None),
    ],
)
def test_stems(name: str, stem: str | None) -> None:
    assert volume_stem(Path("x") / name) == stem


# ---- dialects


def files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def read(root: Path) -> list[tuple[str, str, str]]:
    """Case, image and label, relative to the folder."""
    data_set = read_data_set(root)
    relative = [(c.case_id, c.image.relative_to(root), c.label.relative_to(root)) for c in data_set.cases]
    return [(case_id, image.as_posix(), label.as_posix()) for case_id, image, label in relative]


A = [("a", "imagesTr/a.nii.gz", "labelsTr/a.nii.gz")]
ENTRY_A = {"training": [entry("a.nii.gz")]}
V2 = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "tumor": 2}, "numTraining": 1}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings_that_editors_leave(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps(ENTRY_A | {"name": "Leber µ"}), encoding=encoding)
    assert read(tmp_path) == A
    assert read_data_set(tmp_path).info.name == "Leber µ"


def test_nested_beyond_what_python_parses(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("[" * 200_000)
    with pytest.raises(DataSetError, match="dataset.json: unreadable"):
        read_data_set(tmp_path)


@pytest.mark.parametrize(
    ("name", "image", "label"),
    [
        ("a.nii.gz", "imagesTr/a.nii", "labelsTr/a.nii"),
        ("a.nii", "imagesTr/a.nii.gz", "labelsTr/a.nii.gz"),
        ("a.nii.gz", "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"),
        ("a.nii.gz", "imagesTr/a.NII.GZ", "labelsTr/a.nii.gz"),
        ("a_0000.nii.gz", "imagesTr/a.nii.gz", "labelsTr/a.nii.gz"),
    ],
)
def test_a_file_under_another_name_is_taken_and_said(
    tmp_path: Path, name: str, image: str, label: str
) -> None:
    listing(files(tmp_path, image, label), {"training": [entry(name)]})
    assert read(tmp_path) == [("a", image, label)]
    *_, note = read_data_set(tmp_path).notes
    assert f"imagesTr/{name} is {image}" in note
    assert read_data_set(tmp_path).unlisted == ()


WINDOWS, POSIX = "D:\\data\\Task03\\{}\\{}", "/mnt/old/Task03/{}/{}"


@pytest.mark.parametrize(
    "pattern",
    [
        WINDOWS,
        "\\\\server\\share\\Task03\\{}\\{}",
        "C:/Task03/{}/{}",
        POSIX,
        "Task03/{}/{}",
        "../x/{}/{}",
        " {}/{}",
        "{}/{} ",
        "\t./{}/{}\n",
        " D:\\{}\\{}",
    ],
)
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii"])
def test_paths_of_another_machine_and_spaces_are_found_below_the_folder_and_said(
    tmp_path: Path, pattern: str, name: str
) -> None:
    # The image's name lies there, too, and is not taken for the label.
    files(tmp_path, "a.nii.gz", "imagesTr/a.nii.gz", "labelsTr/a.nii.gz")
    pair = {"image": pattern.format("imagesTr", name), "label": pattern.format("labelsTr", name)}
    assert read(listing(tmp_path, {"training": [pair]})) == A
    *_, note = read_data_set(tmp_path).notes
    assert note.startswith("2 listed files read under another name: ")
    assert note.endswith(" is imagesTr/a.nii.gz")


def test_deeper_ends_of_paths_are_preferred(tmp_path: Path) -> None:
    files(tmp_path, "p/a/ct.nii.gz", "p/a/seg.nii.gz", "a/ct.nii.gz", "a/seg.nii.gz")
    pair = {"image": "/mnt/raw/p/a/ct.nii.gz", "label": "/mnt/raw/p/a/seg.nii.gz"}
    assert read(listing(tmp_path, {"training": [pair]})) == [("ct", "p/a/ct.nii.gz", "p/a/seg.nii.gz")]


@pytest.mark.parametrize("pattern", [WINDOWS, POSIX])
def test_what_is_missing_is_missing_where_it_should_lie(tmp_path: Path, pattern: str) -> None:
    files(tmp_path, "imagesTr/b.nii.gz", "labelsTr/b.nii.gz")
    pair = {
        folder.removesuffix("sTr"): pattern.format(folder, "a.nii.gz") for folder in ("imagesTr", "labelsTr")
    }
    assert read(listing(tmp_path, {"training": [pair]})) == A


@pytest.mark.parametrize("name", [".", "D:\\", "..", "..\\..", "x" * 5000])
def test_paths_that_name_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataSetError, match="is not a case name"):
        read_data_set(listing(tmp_path, {"training": [{"image": name, "label": "labelsTr/a.nii"}]}))


def test_windows_separators(tmp_path: Path) -> None:
    files(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz")
    pair = {"image": ".\\imagesTr\\a.nii.gz", "label": ".\\labelsTr\\a.nii.gz"}
    assert read(listing(tmp_path, {"training": [pair]})) == A


def test_monai_lists(tmp_path: Path) -> None:
    content = {
        "training": [{"image": ["imagesTr/a.nii.gz"], "label": "labelsTr/a.nii.gz", "fold": 0}],
        "validation": [{"image": "imagesTr/b.nii.gz", "label": ["labelsTr/b.nii.gz"]}],
        "test": [{"image": "imagesTs/c.nii.gz"}, "imagesTs/d.nii.gz"],
    }
    assert read(listing(tmp_path, content)) == [*A, ("b", "imagesTr/b.nii.gz", "labelsTr/b.nii.gz")]
    assert [path.name for path in read_data_set(tmp_path).tests] == ["c.nii.gz", "d.nii.gz"]


@pytest.mark.parametrize("image", [["a.nii.gz", "b.nii.gz"], [], "", None, {"0": "a.nii.gz"}])
def test_an_entry_of_several_images_or_none_is_a_fault(tmp_path: Path, image: Any) -> None:
    with pytest.raises(DataSetError, match="does not name one image and one label"):
        read_data_set(listing(tmp_path, {"training": [{"image": image, "label": "a.nii.gz"}]}))


def test_nnunet_2_lists_nothing_and_the_folders_say_what_there_is(tmp_path: Path) -> None:
    names = (
        "imagesTr/a_0000.nii.gz",
        "labelsTr/a.nii.gz",
        "imagesTs/t_0000.nii.gz",
        "imagesTr/b_0000.nii.gz",
    )
    listing(files(tmp_path, *names), V2 | {"file_ending": ".nii.gz"})
    assert read(tmp_path) == [("a", "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")]
    data_set = read_data_set(tmp_path)
    assert [path.name for path in data_set.tests] == ["t_0000.nii.gz"]
    assert [path.name for path in data_set.unlisted] == ["b_0000.nii.gz"]  # an image without a label


def test_nnunet_2_lists_cases_under_dataset(tmp_path: Path) -> None:
    content = V2 | {"dataset": {"a": {"images": ["imagesTr/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz"}}}
    assert read(listing(tmp_path, content)) == [("a", "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")]


def patient(name: str) -> dict[str, str]:
    return {"image": f"p/{name}/ct.nii.gz", "label": f"p/{name}/seg.nii.gz"}


def test_keys_under_dataset_are_the_case_ids(tmp_path: Path) -> None:
    entries = {k: {"images": [v["image"]], "label": v["label"]} for k in "ab" for v in [patient(k)]}
    content = V2 | {"dataset": {"patA": entries["a"], " patB ": entries["b"]}, "numTraining": 2}
    found = read(listing(tmp_path, content))
    assert found == [(f"pat{k.upper()}", f"p/{k}/ct.nii.gz", f"p/{k}/seg.nii.gz") for k in "ab"]
    assert check_listing(tmp_path)[1] == []  # seg is the label's name in a folder of its own


def test_cases_in_folders_of_their_own_are_named_after_these(tmp_path: Path) -> None:
    pairs = [patient("a"), patient("b")]
    assert [case_id for case_id, *_ in read(listing(tmp_path, {"training": pairs}))] == ["a", "b"]
    *_, note = read_data_set(tmp_path).notes
    assert note == "cases are named after their folders, such as a for its ct.nii.gz"
    assert read(listing(tmp_path, {"training": pairs[:1]}))[0][0] == "ct"
    other = {"image": "q/a/ct.nii.gz", "label": "q/a/seg.nii.gz"}
    repeated = r"lists the case 'ct' 3 times: list each once, and give each image a name of its own"
    for more in (patient("a"), other):
        with pytest.raises(DataSetError, match=repeated):
            read_data_set(listing(tmp_path, {"training": [*pairs, more]}))


@pytest.mark.parametrize("ending", ["nii.gz", ".nii.gz", " .nii.gz"])
def test_nnunets_file_ending_may_lack_its_dot(tmp_path: Path, ending: str) -> None:
    files(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    assert [c[0] for c in read(listing(tmp_path, V2 | {"file_ending": ending}))] == ["a"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"file_ending": ".nrrd"}, r"file_ending is '.nrrd': expected .nii.gz or .nii: convert the files"),
        ({"channel_names": {"0": "CT", "1": "PET"}}, "lists 2 channels: expected one, CT"),
    ],
)
def test_nnunet_data_that_is_not_ct_in_nifti(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    files(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    with pytest.raises(DataSetError, match=fault):
        read_data_set(listing(tmp_path, V2 | changes))


RIGHT = {0: "background", 1: "liver", 2: "tumour"}


@pytest.mark.parametrize(
    ("labels", "meanings"),
    [
        ({"0": "background", "1": "liver", "2": "cancer"}, RIGHT),
        ({"background": 0, "liver": 1, "tumor": 2}, RIGHT),
        ({"background": "0", "liver": "1", "Liver Tumour": "2"}, RIGHT),
        ({"background": 0, "whole liver": [1, 2], "lesion": [2]}, RIGHT),
        ({"background": 0, "whole liver": [1, 2], "lesion": 2}, RIGHT),
        ({"background": 0, "tumor": 1, "liver": 2}, {0: "background", 1: "tumour", 2: "liver"}),
        ({}, None),
        (["background", "liver"], {0: "background", 1: "liver"}),
        (["background", "tumour", "liver"], {0: "background", 1: "tumour", 2: "liver"}),
        (["background", {"name": "liver"}, 2], None),
        ({"background": 0.0, "liver": 2.0, "tumour": 1.0}, {0: "background", 1: "tumour", 2: "liver"}),
        ({" 1 ": "tumor", "2 ": "liver", "0": "background"}, {0: "background", 1: "tumour", 2: "liver"}),
        ({"0.0": "background", "1.0": "liver", "2.0": "tumour"}, RIGHT),
        ({"background": " 0", "liver": [1.0, 2.0], "tumour": [" 2 "]}, RIGHT),
        ({"liver": True, "tumour": "2.5", "other": "1e0"}, {}),
        ({"liver": 1.5, "tumor": None}, {}),
        ({"²": "liver", "--1": "x", "9" * 5000: "y", "1": "liver", "tumour": "²"}, {1: "liver"}),
    ],
)
def test_what_labels_mean(labels: Any, meanings: dict[int, str] | None) -> None:
    assert label_meanings({"labels": labels}) == meanings


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (
            {"0": "background", "1": "spleen", "2": "kidney"},
            "has the labels 0 background, 1 spleen, 2 kidney",
        ),
        ({"background": 0, "liver": 1}, "has the labels 0 background, 1 liver"),
        (None, "has no label names"),
        ({"0": "background", "1": "liver", "2": "cancer"}, None),
        ({"background": 0, "liver": [1, 2], "tumor": 2}, None),
    ],
)
def test_whoever_reads_a_data_set_hears_of_foreign_labels(
    tmp_path: Path, labels: dict[str, Any] | None, said: str | None
) -> None:
    data_set = read_data_set(listing(tmp_path, ENTRY_A | ({} if labels is None else {"labels": labels})))
    heard = [note for note in data_set.notes if "make sure that 1 is liver and 2 is tumour" in note]
    assert len(heard) == (said is not None)
    assert all(str(said) in note for note in heard)


@pytest.mark.parametrize(
    "labels",
    [
        {"1": "cancer", "2": "liver"},
        {"tumor": 1, "liver": 2},
        {"liver": [2]},
        ["background", "tumour", "liver"],
        {"background": 0, "liver": 2.0, "tumour": 1.0},
        {" 1 ": "tumor", "2 ": "liver", "0": "background"},
    ],
)
def test_swapped_labels_stop_everything(tmp_path: Path, labels: Any) -> None:
    with pytest.raises(
        DataSetError, match=r"liver and tumour are swapped: .*: swap the values in every label"
    ):
        read_data_set(listing(tmp_path, ENTRY_A | {"labels": labels}))


def test_the_folder_above_or_below_is_named(tmp_path: Path) -> None:
    write_listing(files(tmp_path / "Task03", "imagesTr/liver_0.nii.gz"), ["liver_0"])
    with pytest.raises(DataSetError, match="it is in .*Task03: name that folder"):
        read_data_set(tmp_path)
    with pytest.raises(DataSetError, match="it is in .*Task03: name that folder"):
        read_data_set(tmp_path / "Task03" / "imagesTr")
