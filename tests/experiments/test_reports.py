import base64
import io
import re
from importlib import metadata

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from nbformat import v4
from PIL import Image

from kclib.errors import MissingFileError, StorageError
from kclib.experiments import _provenance, _reports, reports
from kclib.experiments._reports import Chapter, Failure, Report

HEADLINE = "application/vnd.kclib.headline+json"


def png(width: int, height: int, colour) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return base64.encodebytes(file.getvalue()).decode()  # with line breaks, as a kernel sends it


def shows(*bundles, source: str = "", tags=()):
    """A code cell with rich outputs."""
    found = [v4.new_output("display_data", {"text/plain": "plain", **bundle}) for bundle in bundles]
    return v4.new_code_cell(source, outputs=found, metadata={"tags": list(tags)})


def notebook(*cells):
    return v4.new_notebook(cells=list(cells))


@pytest.fixture(scope="module")
def page():
    stream = [v4.new_output("stream", name=name, text=f"said on {name}") for name in ("stdout", "stderr")]
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "0"}, "text/plain": "HBox(children"}
    return _reports.to_html(
        notebook(
            v4.new_markdown_cell("# How many would do?\n\nFirst, see [the report](https://example.org)."),
            v4.new_code_cell("secret_code(1)", outputs=stream),
            shows({"image/png": png(5, 5, "red")}, {"text/html": "<table><tr><td>85.6</td></tr></table>"}),
            shows(widget, {HEADLINE: {"text": "Few"}, "text/markdown": "**Few would do**"}),
        ),
        Chapter("04-clustering", "done", "Few would do", question="How many would do?"),
        before=Chapter("03-embedding", "done", question="Islands?"),
        after=Chapter("05-accuracy", "not run"),
    )


def test_a_page_shows_prose_pictures_tables_and_printed_text(page):
    assert "<title>How many would do?</title>" in page
    assert "said on stdout" in page
    assert "<td>85.6</td>" in page
    assert re.search(r'<img[^>]*src="data:image/png;base64,', page)
    assert re.search(r"<strong>Few would do</strong>|\*\*Few would do\*\*", page)


def test_a_page_opens_with_its_question_then_its_answer_then_the_rest(page):
    assert page.count("<h1") == 1
    parts = ("<h1>How many would do?</h1>", '<p class="answer">Few would do</p>', "First, see")
    places = [page.index(part) for part in parts]
    assert places == sorted(places)


def test_a_page_leads_to_the_index_and_to_its_neighbours(page):
    assert re.findall(r'<a href="([^"]*html)"[^>]*>(.*?)</a>', page.partition("<h1")[0]) == [
        ("index.html", "All questions"),
        ("03-embedding.html", "← Islands?"),
        ("05-accuracy.html", "05-accuracy →"),
    ]


def test_a_page_without_an_answer_says_so_in_its_place():
    made = _reports.to_html(notebook(), Chapter("n", "failed", error="a < b"))
    assert '<p class="answer failed">The notebook has no answer: a &lt; b.</p>' in made


def test_a_page_has_its_code_where_the_switch_hides_it(page):
    before, folded, after = re.split(r'<div class="input">(.*?)</pre>', page, flags=re.DOTALL)[:3]
    assert "secret_code" in folded
    assert "secret_code" not in before + after
    assert "body:not(:has(#code:checked)) .input { display: none; }" in before
    assert page.count('<input type="checkbox" id="code"') == 1


def test_pictures_have_the_text_of_their_figure_or_else_their_heading():
    described = v4.new_output(
        "display_data", {"image/png": png(5, 5, "red")}, metadata={"image/png": {"alt": "y against x"}}
    )
    cells = [
        v4.new_markdown_cell("# Why?"),
        shows({"image/png": png(5, 5, "red")}),
        v4.new_markdown_cell("## The curve\n\n### In <detail>\n\nA line."),
        shows({"image/png": png(5, 5, "red")}),
        v4.new_code_cell("", outputs=[described]),
    ]
    page = _reports.to_html(notebook(*cells), Chapter("n", "done"))
    texts = re.findall(r'alt="(.*?)"', page)
    assert texts == ["Picture: Why?", "Picture: In &lt;detail&gt;", "y against x"]


@pytest.mark.parametrize("noise", ["on stderr", "HBox(", "model_id", "In [", "In&nbsp;"])
def test_a_page_shows_no_prompts_progress_or_widgets(page, noise):
    assert noise not in page


def test_long_printed_text_is_cut_and_lines_that_were_drawn_over_are_left_out():
    text = "".join(f"line {i}\n" for i in range(1000)) + "10 %\r20 %\rdone\n" + "x" * 9000
    stream = v4.new_output("stream", name="stdout", text=text)
    page = _reports.to_html(notebook(v4.new_code_cell("x", outputs=[stream])), Chapter("t", "done"))
    assert "line 99\n... 802 lines are left out here" in page
    assert "line 100\n" not in page
    assert "20 %" not in page
    assert "x" * 2000 + " ..." in page
    assert "x" * 2001 not in page


def test_a_page_needs_nothing_from_the_network(page):
    loading = (
        r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=.(?:https?:)?//[^>]*",
        r"(?:import|fetch)\s*\(?\s*[\"']http[^\"']*",
        r"@import.*http.*",
        r"[uU]rl\s*=\s*[\"']http[^\"']*",
    )
    loaded = [match for pattern in loading for match in re.findall(pattern, page)]
    assert loaded == []
    assert "https://example.org" in page, "a reader's own link may lead outside"


def test_making_a_page_leaves_the_notebook_alone():
    made = notebook(v4.new_code_cell("x", outputs=[v4.new_output("stream", name="stderr", text="bar")]))
    _reports.to_html(made, Chapter("t", "done"))
    assert made.cells[0].outputs[0].text == "bar"


def test_the_headline_is_the_last_one_recorded():
    first, last = shows({HEADLINE: {"text": "first"}}), shows({HEADLINE: {"text": "last"}})
    assert _reports.read_headline(notebook(first, v4.new_markdown_cell("# text"), last)) == "last"


def test_a_notebook_that_recorded_no_headline_has_none():
    assert _reports.read_headline(notebook(shows({"text/markdown": "**bold**"}))) is None


def test_a_headline_is_shown_to_readers_and_recorded_for_the_index(monkeypatch):
    shown = []
    monkeypatch.setattr(reports, "display", lambda data, raw: shown.append(data))
    reports.headline("85.6 % fewer")
    assert _reports.read_headline(notebook(shows(shown[0]))) == "85.6 % fewer"
    assert shown[0]["text/markdown"] == "**85.6 % fewer**"


def thumbnail(folder, *cells) -> np.ndarray:
    chapter = _reports.render(notebook(*cells), folder, Chapter("n", "done"))
    encoded = chapter.thumbnail.removeprefix("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))


def test_the_thumbnail_is_the_first_picture_made_small(tmp_path):
    first, second = ({"image/png": png(1152, 240, colour)} for colour in [(9, 8, 7), "red"])
    found = thumbnail(tmp_path, shows(first), shows(second))
    assert found.shape == (120, 576, 3)
    assert (found == (9, 8, 7)).all()


def test_a_tagged_cells_picture_is_the_thumbnail_in_its_own_size(tmp_path):
    tagged = shows({"image/png": png(5, 4, (1, 2, 3))}, tags=["thumbnail"])
    found = thumbnail(tmp_path, shows({"image/png": png(960, 200, "red")}), tagged)
    assert found.shape == (4, 5, 3)
    assert (found == (1, 2, 3)).all()


def test_rendering_writes_the_page_and_tells_the_chapter(tmp_path):
    made = notebook(v4.new_markdown_cell("# Why?\nSo."), shows({HEADLINE: {"text": "Few"}}))
    found = _reports.render(made, tmp_path, Chapter("n", "done", seconds=2.5))
    assert found == Chapter("n", "done", "Few", seconds=2.5, question="Why?")
    assert "<title>Why?</title>" in (tmp_path / "n.html").read_text()


def test_a_rebuilt_report_links_only_pages_that_are_there(tmp_path):
    stems = ("01-a", "02-b", "03-c")
    for stem in stems[::2]:
        nbformat.write(notebook(v4.new_markdown_cell(f"# {stem}?")), tmp_path / f"{stem}.ipynb")
    _reports.write(tmp_path, Report("x", chapters=tuple(Chapter(stem, "done") for stem in stems)))
    index = _reports.rebuild(tmp_path, "x").read_text()
    assert [x.question for x in _reports.read(tmp_path, "x").chapters] == ["01-a?", "", "03-c?"]
    assert "01-a?" in index
    assert '<a href="03-c.html" rel="next">03-c? →</a>' in (tmp_path / "01-a.html").read_text()
    assert not (tmp_path / "02-b.html").exists()


@pytest.fixture
def index(tmp_path):
    chapters = [
        Chapter(
            "01-done",
            "done",
            "K < N & more",
            thumbnail="data:image/png;base64,AAAA",
            seconds=61.2,
            question="How <many>?",
            thumbnail_alt="y of x",
        ),
        Chapter("02-failed", "failed", error="<lambda> broke", seconds=3),
        Chapter("03-late", "not run"),
    ]
    report = Report(
        "tiny", "Only <some> of it.", tuple(chapters), (Failure("K = 4", "<odd>", "Trace\nback"),),
        _provenance.stamp(),
    )  # fmt: skip
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "02-failed.ipynb").touch()
    path = _reports.write(tmp_path / "new", report)
    assert _reports.read(tmp_path / "new", "tiny") == report
    return path.read_text()


def test_the_index_tells_each_chapters_state(index):
    blocks = re.findall("<article>.*?</article>", index, re.DOTALL)
    assert len(blocks) == 3
    assert re.search(
        'href="01-done.html"><img src="data:image/png;base64,AAAA" alt="y of x".*61 s', blocks[0], re.DOTALL
    )
    assert re.search('href="02-failed.html".*"failed">failed: .*href="02-failed.ipynb"', blocks[1], re.DOTALL)
    assert '"not run">not run<' in blocks[2]
    assert "href" not in blocks[2]


def test_the_index_lists_questions_and_names_files_only_where_there_is_none(index):
    questions = re.findall(r"<h2>\s*(?:<a href=.*?>)?(.*?)(?:</a>)?\s*</h2>", index)
    assert questions == ["How &lt;many&gt;?", "02-failed", "03-late"]


def test_the_index_escapes_what_it_is_given(index):
    for text in ("K &lt; N &amp; more", "&lt;lambda&gt; broke", "Only &lt;some&gt; of it."):
        assert text in index
    assert "<lambda>" not in index


def test_the_index_says_what_made_it_and_needs_nothing_from_the_network(index):
    assert f"torch {metadata.version('torch')}" in index
    assert "http" not in index


def test_what_failed_comes_before_all_else_with_its_traceback(index):
    assert index.index("K = 4 failed:</b> &lt;odd&gt;") < index.index("<article>")
    assert "<pre>Trace\nback</pre>" in index


def test_a_damaged_report_is_begun_anew_and_that_is_said(tmp_path, caplog):
    (tmp_path / "report.json").write_text('{"name": ')
    assert _reports.read(tmp_path, "tiny") == Report("tiny")
    assert f"the report in {tmp_path} is damaged" in caplog.text


def test_a_report_that_was_never_made_cannot_be_rebuilt(tmp_path):
    with pytest.raises(MissingFileError, match=r"no report.*kclib batch"):
        _reports.rebuild(tmp_path, "tiny")


def test_a_report_opens_with_the_main_headlines_or_with_the_last(tmp_path):
    found = [
        _reports.render(
            notebook(shows({HEADLINE: {"text": text, "main": main}})), tmp_path, Chapter(text, "done")
        )
        for text, main in (("first", False), ("best", True), ("also", True), ("last", False))
    ]
    for chapters, opened in ((found, ["best", "also"]), ((found[0], found[3]), ["last"])):
        index = _reports.write(tmp_path, Report("x", chapters=tuple(chapters))).read_text()
        assert re.findall('class="answer">(.*?)</p>', index) == opened


def test_without_git_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(_provenance, "_of_this_process", _provenance._of_this_process.__wrapped__)
    assert _provenance.stamp()["commit"] == "unknown"


def test_tables_and_figures_are_kept_whole(tmp_path):
    table = pd.DataFrame({"k": [2, 3]}, index=[7, 8])
    assert reports.keep(table, tmp_path / "new" / "a.csv").read_text() == "k\n2\n3\n"
    figure = Figure(figsize=(2, 1))
    with Image.open(reports.keep(figure, tmp_path / "a.png")) as picture:
        assert (picture.format, picture.size) == ("PNG", (300, 150))
    with pytest.raises(StorageError):
        reports.keep(table, tmp_path)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.png", "new"]
