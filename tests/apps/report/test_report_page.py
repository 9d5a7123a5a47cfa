"""The page: what it shows, and that it needs nothing else."""

import io
import re
import sys
from dataclasses import replace

import pytest
from report_parts import SHA, Page, bundle_manifest, ensemble, measured
from rich.console import Console

from apps.report import print_validation, render_report
from apps.report.wording import percent, points
from pipeline.errors import EdgefoldError, UnsupportedError


def test_the_page_needs_nothing_else(full_page):
    assert "http:" not in full_page
    assert "https:" not in full_page
    assert "@import" not in full_page
    assert "url(" not in full_page.replace("url(#", "")
    page = Page(full_page)
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    inner = {address[1:] for address in page.addresses if address.startswith("#")}
    inner |= set(re.findall(r"url\(#([^)]*)\)", full_page))
    assert inner <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_the_page_says_what_was_measured(full_page):
    text = " ".join(Page(full_page).text.split())
    for expected in (
        "Within the budget of 0.5 points, but on too few images to be sure",
        "99.83%",  # before: 599 of 600
        "99.50%",  # after: 597 of 600
        "+0.33",
        "same by construction",
        "by index",
        "1 image skipped",
        "3 lost, 1 gained",
        "BatchNormalization",
        "its output has <2> consumers",
        "entropy from 128 images of train",
        "4.00×",
        "1.23 M",
        "edgefold build inception_v3 --out <dir>",
        SHA,
    ):
        assert expected in text, expected


def test_names_from_outside_are_text_not_markup(full_page):
    # Page refuses any script element; the names must nevertheless be there, in tables and in plots.
    page = Page(full_page)
    assert page.text.count("<script>bee</script>") >= 2
    assert "cost $x_{ & 日本" in page.text
    assert any("<script>bee</script>" in image["alt"] for image in page.images)


def test_every_picture_has_words(full_page):
    page = Page(full_page)
    assert len(page.images) == 4
    assert page.images[0]["src"].startswith("data:image/jpeg;base64,/9j/")
    assert all("taken for" in image["alt"] for image in page.images)
    figures = re.findall(r'<figure role="img" aria-label="([^"]+)"', full_page)
    assert len(figures) == full_page.count("<svg") == 5
    for figure, starts in zip(
        figures,
        (
            "Drop of top-1 with 95% intervals: export 0.00 points",
            "Accuracy against confidence: PyTorch fp32: mean confidence 96.47%, right 99.83%, expected",
            "Accuracy of each class before and after: ant ",
            "Changes of confusions, truth against answer: ",
            "Calibrated range of each of 9 activations",
        ),
        strict=True,
    ):
        assert figure.startswith(starts)


def test_plots_take_the_colours_of_the_page(full_page):
    plots = re.findall(r"<svg.*?</svg>", full_page, re.DOTALL)
    for plot in plots:
        assert re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", plot) == []
        assert "var(--ink)" in plot
        assert "DejaVu" not in plot
    assert "prefers-color-scheme: dark" in full_page
    assert "@media print" in full_page


def test_the_same_result_gives_the_same_bytes(tmp_path):
    result = measured()
    for name in ("a", "b"):
        render_report(tmp_path / name, validation=result)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_is_not_given_has_no_section(tmp_path):
    render_report(tmp_path / "r.html", validation=measured(lost=0, gained=0))
    html = (tmp_path / "r.html").read_text()
    page = Page(html)
    for name in ("folding", "calibration", "latency", "flips", "confusion"):
        assert name not in page.ids
    assert {"drop", "classes", "provenance"} <= set(page.ids)


def test_an_engine_that_was_not_validated_says_so(tmp_path):
    render_report(tmp_path / "r.html", validation=None, manifest=bundle_manifest())
    page = Page((tmp_path / "r.html").read_text())
    assert "Accuracy not measured" in page.text
    assert "folding" in page.ids
    assert "drop" not in page.ids


def test_many_classes_are_shown_by_how_much_they_changed(tmp_path):
    result = measured()
    many = tuple(
        replace(
            result.classes[0],
            index=i,
            label=f"class {i}",
            after_correct=180 - i,
            after_accuracy=0.9 - i / 200,
        )
        for i in range(60)
    )
    render_report(tmp_path / "r.html", validation=replace(result, classes=many))
    html = (tmp_path / "r.html").read_text()
    plot = re.search(r'aria-label="Accuracy of each class[^"]*"', html)[0]
    assert "class 59 " in plot
    assert "class 43 " not in plot
    assert "The 16 classes that changed most, of 60" in html


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        EdgefoldError, match=r"report\.html'?: No space left on device; give another --report"
    ):
        render_report(path, validation=measured())
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(EdgefoldError, match="No such file or directory"):
        render_report(tmp_path / "nowhere" / "r.html", validation=measured())


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"edgefold\[report\]"):
        render_report(tmp_path / "r.html", validation=measured())
    assert list(tmp_path.iterdir()) == []


def test_an_ensemble_is_shown_with_each_of_its_networks(tmp_path):
    result = ensemble()
    render_report(tmp_path / "r.html", validation=result, title="both")
    page = Page((tmp_path / "r.html").read_text())
    assert "members" in page.ids
    for member in result.members:
        assert page.text.count(member.name) >= 2  # table and provenance; and the plot
        assert percent(member.after.top1) in page.text
        assert points(-member.to_ensemble.drop_points) in page.text
    assert "first" in page.text
    stream = io.StringIO()
    print_validation(result, Console(file=stream, width=80, highlight=False))
    assert max(map(len, stream.getvalue().splitlines())) <= 80
    assert "better by" in stream.getvalue()
    assert "<i>first</i>" in stream.getvalue()
