"""The Playground in Chromium, on the real feedback app and log; only the model is a stand-in."""

import os
import shutil
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
import uvicorn
from fastapi import FastAPI, Header, Response
from fastapi.responses import JSONResponse
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from contracts.access import Principal
from contracts.errors import Unauthenticated
from contracts.events import TOPICS, Stamper
from contracts.log import Log
from contracts.v1 import events_pb2 as pb
from feedback import notice
from feedback.app import create_app
from feedback.consent import ConsentLedger
from feedback.vault import open_events

KEY = "il-ann-0123456789"
RELEASE = "r0007-c0ffee00"
ARTIFACTS = Path(__file__).parents[2] / "test-artifacts" / "playground"
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def authenticate(header: str | None) -> Principal:
    if header != f"Bearer {KEY}":
        raise Unauthenticated("no such key")
    return Principal("ann", "key-1")


@dataclass
class Model:
    """Stands in for serving: answers with set texts, and records what serving would record."""

    log: Log
    consent: ConsentLedger
    texts: list[str] = field(
        default_factory=lambda: [f"Output number {i}: thank you, neighbour." for i in range(9)]
    )
    go: threading.Event = field(default_factory=threading.Event)
    refusal: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)

    def complete(self, body: dict[str, Any], source: str, shown: str) -> Response:
        self.asked.append(body)
        self.go.wait(timeout=30)
        if self.refusal:
            return JSONResponse({"error": {"message": self.refusal}}, 400)
        texts = self.texts[: body["n"]]
        completion_id = f"chatcmpl-{len(self.asked)}"
        granted = self.consent.granted_notice("ann")
        recorded = source == "playground" and granted is not None and granted == shown
        if recorded:
            self.log.append([self._event(completion_id, body, texts, shown)])
        answer = {
            "id": completion_id,
            "system_fingerprint": RELEASE,
            "choices": [
                {
                    "index": i,
                    "message": {"role": "assistant", "content": t},
                    "finish_reason": "stop",
                }
                for i, t in enumerate(texts)
            ],
            "usage": {"prompt_tokens": 11, "completion_tokens": 40, "total_tokens": 51},
        }
        headers = {
            "x-policy-release": RELEASE,
            "x-instructloop-recorded": "true" if recorded else "false",
        }
        return JSONResponse(answer, headers=headers)

    def _event(self, id: str, body: dict[str, Any], texts: list[str], shown: str) -> pb.Event:
        completion = pb.Completion(
            completion_id=id,
            prompt=pb.Prompt(messages=[pb.Message(**m) for m in body["messages"]]),
            outputs=[pb.Output(index=i, text=text) for i, text in enumerate(texts)],
            release_id=RELEASE,
            source=pb.SOURCE_PLAYGROUND,
            notice_version=shown,
        )
        return Stamper("stand-in").event("ann", completion)


@dataclass
class Site:
    url: str
    log: Log
    model: Model

    def events(self, topic: str) -> list[pb.Event]:
        return [record.event for record in self.log.read(topic, 0, 0, 1000)]

    def ranked(self) -> list[list[list[int]]]:
        """The groups of every ranking in the log."""
        rankings = [event.ranking for event in self.events("rankings")]
        return [[list(group.outputs) for group in ranking.groups] for ranking in rankings]

    def logged(self) -> dict[str, int]:
        return {topic: len(events) for topic in TOPICS if (events := self.events(topic))}


def app_of(model: Model) -> FastAPI:
    """The feedback app behind the routes that serving brings."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    def complete(
        body: dict[str, Any],
        x_instructloop_source: Annotated[str, Header()] = "",
        x_instructloop_notice: Annotated[str, Header()] = "",
    ) -> Response:
        return model.complete(body, x_instructloop_source, x_instructloop_notice)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "policy", "max_model_len": 256}]}

    @app.get("/v1/releases")
    def releases() -> dict[str, Any]:
        return {"object": "list", "serving": RELEASE, "data": []}

    app.mount(
        "/",
        create_app(
            sink=model.log, source=model.log, authenticate=authenticate, consent=model.consent
        ),
    )
    return app


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    log = open_events(f"sqlite:///{tmp_path}/log.sqlite")
    model = Model(log, ConsentLedger(log))
    model.go.set()
    config = uvicorn.Config(app_of(model), port=0, ws="none", log_level="warning")
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    socket.listen()  # requests wait until the server is up
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    yield Site(f"http://127.0.0.1:{socket.getsockname()[1]}", log, model)
    model.go.set()
    server.should_exit = True
    thread.join()
    socket.close()
    log.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        reason = "no chromium on the PATH; Debian and Ubuntu have it as the package chromium"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    expect.set_options(timeout=60_000)  # a busy machine is slow, not wrong
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGS)
        yield browser
        browser.close()


@pytest.fixture
def complaints() -> list[str]:
    """The console's errors and warnings: of scripts, of the page's policy, of failed requests."""
    return []


@pytest.fixture
def page(browser: Browser, complaints: list[str]) -> Iterator[Page]:
    yield from a_page(browser, complaints)
    assert complaints == []


def a_page(browser: Browser, complaints: list[str], **options: Any) -> Generator[Page]:
    context = browser.new_context(**{"viewport": {"width": 1000, "height": 900}} | options)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.on(
        "console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    context.close()


def keep(page: Page, name: str) -> None:
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=ARTIFACTS / f"{name}.png", full_page=True, animations="disabled")


def enter(page: Page, site: Site, *, agree: bool) -> None:
    page.goto(f"{site.url}/#key={KEY}")
    page.get_by_role("button", name="I agree" if agree else "No, keep nothing").click()
    expect(page.locator("#notice")).to_be_hidden()


def ask(page: Page, *, answers: int = 4, prompt: str = "Thank a neighbour.") -> list[int]:
    """Ask, and return the output index of each card from the top; the stand-in's texts name it."""
    page.get_by_label("What should the model do?").fill(prompt)
    page.get_by_role("spinbutton", name="Answers").fill(str(answers))
    page.get_by_role("button", name="Get answers").click()
    expect(cards(page)).to_have_count(answers)
    return order(page)


def cards(page: Page) -> Locator:
    return page.locator("#cards .card")


def order(page: Page) -> list[int]:
    return [
        int(text.split()[2].rstrip(":")) for text in page.locator(".answer-text").all_inner_texts()
    ]


def drag(page: Page, card: int, *, to_top_of: int) -> None:
    """With the mouse, from the head of one card to just above that of another, both by place."""
    start = cards(page).nth(card).locator("h3").bounding_box()
    end = cards(page).nth(to_top_of).bounding_box()
    assert start and end
    x = start["x"] + 5
    page.mouse.move(x, start["y"] + 5)
    page.mouse.down()
    page.mouse.move(x, (start["y"] + end["y"]) / 2, steps=4)
    page.mouse.move(x, end["y"] + 4, steps=4)
    page.mouse.up()


def send(page: Page) -> None:
    page.locator("#send-ranking").click()
    expect(page.locator("#kept")).to_be_visible()


def test_the_key_in_the_address_moves_into_the_tab(page: Page, site: Site) -> None:
    page.goto(f"{site.url}/#key={KEY}")
    expect(page.get_by_label("What should the model do?")).to_be_visible()
    assert page.url == f"{site.url}/"
    assert page.evaluate("[Object.values(sessionStorage), localStorage.length]") == [[KEY], 0]
    page.get_by_role("button", name="Forget key").click()
    expect(page.get_by_label("API key", exact=True)).to_be_visible()
    assert page.evaluate("Object.values(sessionStorage)") == []


def test_a_wrong_key_is_asked_for_again(page: Page, site: Site, complaints: list[str]) -> None:
    page.goto(site.url)
    expect(page.get_by_label("API key", exact=True)).to_be_visible()
    keep(page, "1-key")
    page.get_by_label("API key", exact=True).fill("il-wrong")
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_role("alert")).to_have_text("This key was not accepted. no such key")
    expect(page.get_by_label("What should the model do?")).to_be_hidden()
    page.get_by_label("API key", exact=True).fill(KEY)
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_label("What should the model do?")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()
    assert len(complaints) == 1 and "401" in complaints.pop()


def test_who_does_not_opt_in_leaves_nothing_in_the_log(page: Page, site: Site) -> None:
    page.goto(f"{site.url}/#key={KEY}")
    expect(page.locator("#notice-text")).to_contain_text(notice.CURRENT.text.split("\n\n")[0])
    expect(page.locator("#consent-bar")).to_contain_text("Not opted in")
    keep(page, "2-notice")
    page.get_by_role("button", name="No, keep nothing").click()
    ask(page)
    expect(page.locator("#why-not")).to_contain_text("You have not opted in")
    expect(page.locator("#send-ranking")).to_be_hidden()
    expect(page.locator("#origin")).to_contain_text(RELEASE)
    keep(page, "3-nothing-kept")
    page.keyboard.press("Alt+ArrowDown")
    assert site.logged() == {}


def test_the_order_made_with_the_keyboard_arrives_in_the_log(page: Page, site: Site) -> None:
    enter(page, site, agree=True)
    a, b, c, d = ask(page)
    expect(page.locator("#send-ranking")).to_have_text("The order is right as it is: send")
    expect(page.locator("#origin")).to_be_hidden()
    status = page.get_by_role("status")

    cards(page).nth(0).focus()
    page.keyboard.press("Alt+ArrowDown")
    expect(status).to_have_text("Answer A: place 2 of 4.")
    assert order(page) == [b, a, c, d]

    cards(page).nth(2).focus()
    page.keyboard.press("t")
    expect(status).to_have_text("Answer C: place 2 of 3, tied with A.")

    page.keyboard.press("Alt+ArrowUp")  # out of the tie, above A
    expect(status).to_have_text("Answer C: place 2 of 4.")
    assert order(page) == [b, c, a, d]
    page.keyboard.press("Control+z")
    expect(status).to_have_text("Undone. Order: B, then A tied with C, then D.")
    expect(page.locator(".card:focus h3")).to_have_text("Answer C")
    keep(page, "4-ranking")

    send(page)
    assert site.ranked() == [[[b], [a, c], [d]]]
    (event,) = site.events("rankings")
    assert event.user_id == "ann"
    assert event.ranking.completion_id == "chatcmpl-1"
    assert event.ranking.source == pb.SOURCE_PLAYGROUND
    assert event.ranking.instruction_version == "1"
    assert event.ranking.notice_version == notice.CURRENT.version
    assert 0 < event.ranking.seconds_spent < 60
    expect(page.locator("#origin")).to_have_text(
        f"Answered by release {RELEASE} · 11 prompt and 40 answer tokens"
    )
    expect(page.get_by_role("contentinfo")).to_contain_text(RELEASE)
    keep(page, "5-sent")


def test_the_order_made_with_the_mouse_arrives_in_the_log(page: Page, site: Site) -> None:
    page.emulate_media(reduced_motion="reduce")  # cards stand where they belong when measured
    enter(page, site, agree=True)
    a, b, c, d = ask(page)
    drag(page, 3, to_top_of=0)
    assert order(page) == [d, a, b, c]
    page.get_by_role("button", name="Tie answer B with the one above").click()
    drag(page, 0, to_top_of=2)  # between A and B, which are tied: joins them
    assert order(page) == [a, d, b, c]
    page.get_by_role("button", name="Move answer C up").click()
    assert order(page) == [c, a, d, b]
    page.get_by_role("button", name="Undo").click()
    assert order(page) == [a, d, b, c]
    send(page)
    assert site.ranked() == [[[a, d, b], [c]]]


def test_a_drag_that_is_given_up_changes_nothing(page: Page, site: Site) -> None:
    enter(page, site, agree=True)
    before = ask(page)
    head = cards(page).nth(3).locator("h3").bounding_box()
    assert head
    page.mouse.move(head["x"] + 5, head["y"] + 5)
    page.mouse.down()
    page.mouse.move(head["x"] + 5, head["y"] - 120, steps=5)
    expect(page.locator(".drop-before, .drop-after")).to_have_count(1)
    page.keyboard.press("Escape")
    page.mouse.up()
    assert order(page) == before
    expect(page.get_by_role("button", name="Undo")).to_be_disabled()


def test_the_place_of_an_output_says_nothing(page: Page, site: Site) -> None:
    enter(page, site, agree=True)
    shown = ask(page, answers=9)  # in order by chance once in 362,880 runs
    assert sorted(shown) == list(range(9)) != shown
    assert page.locator("#cards h3").all_inner_texts() == [f"Answer {x}" for x in "ABCDEFGHI"]


def test_withdrawing_is_one_click_and_counts_at_once(page: Page, site: Site) -> None:
    enter(page, site, agree=True)
    ask(page)
    page.get_by_role("button", name="Withdraw").click()
    expect(page.locator("#consent-bar")).to_contain_text("Not opted in")
    expect(page.locator("#withdrawn")).to_contain_text("leaves out all that you gave before")
    expect(page.locator("#send-ranking")).to_be_hidden()
    keep(page, "6-withdrawn")
    assert site.logged() == {"consents": 2, "completions": 1}
    granted, withdrawn = (event.consent for event in site.events("consents"))
    assert granted.state == pb.CONSENT_STATE_GRANTED
    assert withdrawn.state == pb.CONSENT_STATE_WITHDRAWN
    ask(page, answers=3)
    expect(page.locator("#why-not")).to_contain_text("You have not opted in")
    assert site.logged() == {"consents": 2, "completions": 1}


def test_erasing_asks_once_more_and_leaves_nothing_to_read(page: Page, site: Site) -> None:
    enter(page, site, agree=True)
    ask(page)
    page.get_by_role("button", name="Notice").click()
    page.get_by_role("button", name="Erase all that I wrote").click()
    page.get_by_role("button", name="Keep it").click()
    assert site.logged() == {"consents": 1, "completions": 1}
    page.get_by_role("button", name="Erase all that I wrote").click()
    keep(page, "6-erase")
    page.get_by_role("button", name="Erase for good").click()
    expect(page.locator("#erased")).to_contain_text("nobody can read it again")
    expect(page.locator("#erased")).to_be_focused()
    expect(page.locator("#consent-bar")).to_contain_text("Not opted in")
    assert site.logged() == {"consents": 2}
    assert site.events("consents")[1].consent.erased


def test_consent_after_the_answers_does_not_make_them_kept(page: Page, site: Site) -> None:
    enter(page, site, agree=False)
    ask(page)
    page.get_by_role("button", name="Notice").click()
    page.get_by_role("button", name="I agree").click()
    expect(page.locator("#why-not")).to_contain_text("The server did not keep these answers")
    expect(page.locator("#send-ranking")).to_be_hidden()
    assert site.logged() == {"consents": 1}


def test_a_reload_keeps_the_key_and_the_choice(page: Page, site: Site) -> None:
    enter(page, site, agree=True)
    page.reload()
    expect(page.locator("#consent-bar")).to_contain_text("Opted in")
    expect(page.locator("#notice")).to_be_hidden()


def test_a_ranking_whose_reply_got_lost_counts_once(
    page: Page, site: Site, complaints: list[str]
) -> None:
    enter(page, site, agree=True)
    a, b = ask(page, answers=2)

    def lose_the_reply(route: Route) -> None:
        route.fetch()
        route.abort()

    page.route("**/v1/feedback/rankings", lose_the_reply, times=1)
    page.locator("#send-ranking").click()
    expect(page.get_by_role("alert")).to_contain_text("could not be reached")
    assert len(complaints) == 1 and "ERR_FAILED" in complaints.pop()
    send(page)
    assert site.ranked() == [[[a], [b]]]


def test_stop_ends_the_wait(page: Page, site: Site) -> None:
    enter(page, site, agree=False)
    site.model.go.clear()
    page.get_by_label("What should the model do?").fill("Wait")
    page.get_by_label("What should the model do?").press("Control+Enter")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    expect(page.locator("#answers")).to_be_hidden()
    site.model.go.set()
    ask(page)


def test_a_refusal_is_shown_in_the_server_s_words(
    page: Page, site: Site, complaints: list[str]
) -> None:
    enter(page, site, agree=False)
    site.model.refusal = "max_tokens: expected at most 256, got 300"
    page.get_by_label("What should the model do?").fill("Hello")
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_role("button", name="Get answers").click()
    expect(page.get_by_role("alert")).to_have_text(site.model.refusal)
    assert len(complaints) == 1 and "400" in complaints.pop()
    assert site.model.asked[0] == {
        "model": "policy",
        "messages": [{"role": "user", "content": "Hello"}],
        "n": 4,
        "temperature": 0.3,
        "max_tokens": 128,
    }


def test_what_a_model_writes_is_only_text(page: Page, site: Site) -> None:
    site.model.texts = ["<img src=x onerror=alert(1)>", "<script>alert(2)</script>"]
    enter(page, site, agree=False)
    page.get_by_role("spinbutton", name="Answers").fill("2")
    page.get_by_label("What should the model do?").fill("<b>bold</b>")
    page.get_by_role("button", name="Get answers").click()
    expect(cards(page)).to_have_count(2)
    assert sorted(page.locator(".answer-text").all_inner_texts()) == site.model.texts
    assert page.locator("main img, main script, main b").count() == 0


def test_the_page_s_policy_is_in_force(page: Page, site: Site, complaints: list[str]) -> None:
    enter(page, site, agree=False)
    assert complaints == []
    page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "window.ran = true";
          document.body.append(script);
        }"""
    )
    assert page.evaluate("window.ran") is None
    assert len(complaints) == 1 and "Content Security Policy" in complaints.pop()


def _no_sideways_scroll(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_scrolling_sideways(
    browser: Browser, site: Site, complaints: list[str], scheme: str
) -> None:
    site.model.texts[1] = "Output number 1: " + "w" * 100
    site.model.texts[2] = "Output number 2: " + "We came home to a jungle of basil. " * 40
    options = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme}
    pages = a_page(browser, complaints, **options)
    page = next(pages)
    steps: list[tuple[str, Callable[[], object]]] = [
        ("1-key", lambda: page.goto(site.url)),
        ("2-notice", lambda: page.goto(f"{site.url}/?phone#key={KEY}")),
        ("3-ask", lambda: page.get_by_role("button", name="I agree").click()),
        ("4-ranking", lambda: ask(page, prompt="p" * 200)),
        ("5-tied", lambda: page.locator(".tie").nth(2).click()),
        ("6-sent", lambda: send(page)),
        ("7-withdrawn", lambda: page.get_by_role("button", name="Withdraw").click()),
    ]
    for name, step in steps:
        step()
        page.wait_for_load_state("networkidle")
        _no_sideways_scroll(page)
        keep(page, f"phone-{scheme}-{name}")
    expect(page.locator(".more")).to_have_count(1)  # only the long answer is folded
    assert complaints == []
    pages.close()
