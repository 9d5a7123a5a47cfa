"""The verdict, the terminal's tables, and agreement where there are no labels."""

import io

from report_parts import Page, bundle_manifest, measured, printed, unlabelled
from rich.console import Console

from apps.report import print_agreement, print_validation, render_report, verdict
from apps.report.wording import agreement_verdict, p_value, percent, points, short, sqnr


class TestVerdict:
    def test_a_loss_that_chance_does_not_explain(self):
        said = verdict(measured(lost=60, gained=2))
        assert said.level == "bad"
        assert said.headline == "OpenVINO int8 costs accuracy: 9.67 points of top-1"
        assert "60 lost, 2 gained, a drop of 9.67 points" in said.sentences[0]
        assert "Chance alone hardly makes such a difference (McNemar p = < 0.0001)" not in said.sentences[1]
        assert "Chance alone hardly makes such a difference (McNemar p < 0.0001)" in said.sentences[1]

    def test_no_loss_on_enough_images(self):
        said = verdict(measured(lost=2, gained=2, n=3000))
        assert (said.level, said.headline) == ("good", "OpenVINO int8 keeps the accuracy")
        assert "no change in top-1" in said.sentences[0]

    def test_no_loss_shown_on_few_images(self):
        said = verdict(measured(lost=1, gained=1, n=90))
        assert said.level == "unsure"
        assert "90 images cannot rule out" in said.headline

    def test_a_gain(self):
        said = verdict(measured(lost=0, gained=30))
        assert said.level == "good"
        assert "a gain of 5.00 points" in said.sentences[0]

    def test_the_budget_decides_where_there_is_one(self):
        assert verdict(measured(lost=60, gained=2), 5).level == "bad"
        good = verdict(measured(lost=60, gained=2), 15)
        assert (good.level, good.sentences[-1]) == ("good", "The whole interval lies within the budget.")
        unsure = verdict(measured(lost=1, gained=1), 0.1)
        assert unsure.level == "unsure"
        assert "images are needed to show that an engine without a drop is within it" in unsure.sentences[-1]
        close = verdict(measured(lost=60, gained=2), 10)  # 9.67, and up to 12.3
        assert close.level == "unsure"
        assert close.sentences[-1].startswith("The interval reaches past the budget of 10; about ")


def test_numbers_as_text():
    assert [points(v) for v in (0.25, -0.1, 0.001, -0.001)] == ["+0.25", "−0.10", "0.00", "0.00"]
    assert percent(0.94155) == "94.16%"
    assert (sqnr(None), sqnr(18.26)) == ("identical", "18.3 dB")
    assert [short(n) for n in (999, 1500, 29197568, 13.2e9)] == ["999", "1.5 k", "29.2 M", "13.2 G"]
    assert (p_value(0.0321), p_value(1.0), p_value(1e-9)) == ("= 0.032", "= 1", "< 0.0001")


def test_the_terminal_tables_fit_80_columns_and_keep_every_number():
    text = printed(80, max_drop_points=0.5)
    assert max(map(len, text.splitlines())) <= 80
    for expected in (
        "export",
        "INT8",
        "total",
        "+1.33",
        "9/1",
        "98.33%",
        "Past the budget",
        "1 image skipped",
        "3.37%",  # ECE of the fp32 stages
        "Confusions that changed most: ",
        "3 of 3 that lost; none of 3 changed by",
    ):
        assert expected in text, expected
    assert "…" not in text


class TestAgreement:
    def test_the_page_claims_no_accuracy(self, tmp_path):
        render_report(
            tmp_path / "r.html", validation=None, agreement=unlabelled(), manifest=bundle_manifest()
        )
        html = (tmp_path / "r.html").read_text()
        page = Page(html)
        assert "97.00% of the answers" in page.text
        assert "The images carry no labels: which answer is right is not known." in page.text
        assert "top-1 can have fallen by 3.00 points at most" in page.text
        assert "<b>2</b>.png" in page.text
        assert "a note" in page.text
        assert "Top-1 after" not in page.text
        assert "Accuracy not measured" not in page.text
        assert {"agreement", "flips", "provenance"} <= set(page.ids)
        assert "drop" not in page.ids

    def test_the_limit_decides_where_there_is_one(self):
        assert agreement_verdict(unlabelled(97), 98).level == "bad"
        assert agreement_verdict(unlabelled(97), 95).level == "unsure"  # 91.5 to 99.0
        assert "too few images to be sure" in agreement_verdict(unlabelled(97), 95).headline
        assert agreement_verdict(unlabelled(97), 90).level == "good"
        assert agreement_verdict(unlabelled(97)).headline == "OpenVINO int8 keeps 97.00% of the answers"

    def test_the_terminal_fits_80_columns(self):
        stream = io.StringIO()
        print_agreement(
            unlabelled(), Console(file=stream, width=80, highlight=False), min_agreement_percent=90
        )
        text = stream.getvalue()
        assert max(map(len, text.splitlines())) <= 80
        for expected in ("export", "INT8", "total", "97.00%", "identical", "31.0 dB", "note: a note"):
            assert expected in text, expected


def test_markup_in_names_is_not_interpreted():
    stream = io.StringIO()
    result = measured(notes=["[bold]not bold[/]"])
    print_validation(result, Console(file=stream, width=100))
    assert "[bold]not bold[/]" in stream.getvalue()
