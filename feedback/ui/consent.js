// Consent: the notice, the choice, and the state that is always in sight.

import { getConsent, putConsent } from "./api.js";

const DECLINED = "instructloop.declined"; // the notice that was declined in this tab: not opened again by itself

const $ = (id) => document.getElementById(id);

export class ConsentPanel {
  #state = null; // as GET /v1/consent gives it
  #onChange;
  #onError;

  constructor(onChange, onError) {
    this.#onChange = onChange;
    this.#onError = onError;
    $("agree").addEventListener("click", () => this.#choose(true));
    $("decline").addEventListener("click", () => this.#decline());
    $("withdraw").addEventListener("click", () => this.#choose(false));
    $("erase").addEventListener("click", () => this.#askToErase(true));
    $("erase-not").addEventListener("click", () => this.#askToErase(false));
    $("erase-now").addEventListener("click", () => this.#choose(false, true));
    $("notice-toggle").addEventListener("click", () => this.#open($("notice").hidden));
  }

  // The version of the notice that this page shows.
  get notice() {
    return this.#state.notice.version;
  }

  // Agreed to the notice as it reads today. An older agreement covers nothing that is done under a new notice.
  get granted() {
    return this.#state !== null && this.#state.granted && this.#state.notice_version === this.#state.notice.version;
  }

  async load() {
    this.#state = await getConsent();
    this.#render();
    this.#open(!this.granted && sessionStorage.getItem(DECLINED) !== this.notice);
  }

  close() {
    this.#state = null;
    $("consent-bar").hidden = true;
    $("withdrawn").hidden = $("erased").hidden = true;
    this.#open(false);
  }

  async #choose(granted, erase = false) {
    const buttons = [$("agree"), $("decline"), $("withdraw"), $("erase-now")];
    buttons.forEach((button) => (button.disabled = true));
    try {
      this.#state = await putConsent(granted, this.notice, erase);
      if (granted) sessionStorage.removeItem(DECLINED);
      else this.#remember();
      this.#render();
      $("withdrawn").hidden = granted || erase;
      $("erased").hidden = !erase;
      this.#open(false);
      // What was clicked is gone: the focus goes to what came instead.
      $(granted ? "notice-toggle" : erase ? "erased" : "withdrawn").focus();
      this.#onChange(
        granted ? "You have opted in."
          : erase ? "What you wrote is erased."
          : "You have withdrawn. Nothing more is kept.",
      );
    } catch (error) {
      this.#onError(error);
    } finally {
      buttons.forEach((button) => (button.disabled = false));
    }
  }

  // Whoever agreed to an older notice and declines the new one withdraws; others just go on without.
  #decline() {
    if (this.#state.granted) return this.#choose(false);
    this.#remember();
    this.#open(false);
    $("notice-toggle").focus();
    this.#onChange("You have not opted in. Nothing is kept.");
  }

  #askToErase(asked) {
    $("erase").hidden = asked;
    $("erase-sure").hidden = !asked;
    $(asked ? "erase-not" : "erase").focus();
  }

  #remember() {
    sessionStorage.setItem(DECLINED, this.notice);
  }

  #render() {
    const outdated = this.#state.granted && !this.granted;
    $("consent-bar").hidden = false;
    $("consent-state").textContent = this.granted ? "Opted in" : "Not opted in";
    $("consent-means").textContent = this.granted ? "kept for training" : "nothing is kept";
    $("consent-chip").classList.toggle("on", this.granted);
    $("withdraw").hidden = !this.#state.granted;
    $("notice-choice").hidden = this.granted;
    $("notice-changed").hidden = !outdated;
    const paragraphs = this.#state.notice.text.split(/\n\s*\n/).map((text) => {
      const paragraph = document.createElement("p");
      paragraph.textContent = text;
      return paragraph;
    });
    $("notice-text").replaceChildren(...paragraphs);
  }

  #open(open) {
    $("notice").hidden = !open;
    $("erase").hidden = false;
    $("erase-sure").hidden = true;
    $("notice-toggle").setAttribute("aria-expanded", String(open));
  }
}
