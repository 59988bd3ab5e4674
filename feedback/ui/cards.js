// The answers as cards: blinded letters, drag, keyboard, ties. Model text only ever becomes text nodes.

import { Arrangement, groupOf, move, place, shuffled, toggleTie } from "./ranking.js";

const LETTERS = "ABCDEFGHI";
const EDGE = 60; // px from the top or bottom of the window where a drag scrolls

export class AnswerCards {
  #list;
  #announce;
  #onChange;
  #items = []; // candidate -> its <li>
  #arrangement = null;
  #frozen = true;

  constructor(list, announce, onChange) {
    this.#list = list;
    this.#announce = announce;
    this.#onChange = onChange;
    list.addEventListener("keydown", (event) => this.#onKey(event));
    list.addEventListener("pointerdown", (event) => this.#onPointerDown(event));
  }

  // `choices` as the API gives them. Their order, and so the letters, are shuffled: no position means anything.
  show(choices, rankable) {
    this.#arrangement = new Arrangement(shuffled(choices.length));
    this.#items = [];
    this.#arrangement.groups.flat().forEach((candidate, shown) => {
      this.#items[candidate] = this.#card(candidate, choices[candidate], LETTERS[shown]);
    });
    this.#frozen = !rankable;
    this.#list.classList.toggle("unranked", !rankable);
    this.#render();
    this.#items.forEach(foldIfLong);
  }

  // No more changes. Places are shown only if they are a ranking that was kept.
  freeze(ranked) {
    this.#frozen = true;
    this.#list.classList.toggle("unranked", !ranked);
    this.#render();
  }

  // Output indices, best group first.
  get groups() {
    return this.#arrangement.groups;
  }

  get touched() {
    return this.#arrangement !== null && this.#arrangement.touched;
  }

  undo() {
    if (this.#frozen || !this.#arrangement.undo()) return;
    this.#redraw(this.#arrangement.groups[0][0]);
    this.#announce("Undone. " + this.#spoken());
    this.#onChange();
  }

  #change(candidate, step, ...args) {
    if (this.#frozen || !this.#arrangement.change(step, candidate, ...args)) return;
    this.#redraw(candidate);
    this.#announce(this.#where(candidate));
    this.#onChange();
  }

  // The focus stays where it was; on the card of `candidate` if its button can no longer be used.
  #redraw(candidate) {
    const focused = document.activeElement;
    const before = this.#items.map((item) => item.getBoundingClientRect().top);
    this.#render();
    if (this.#list.contains(focused)) {
      focused.focus();
      if (document.activeElement !== focused) card(this.#items[candidate]).focus();
    }
    slide(this.#items, before);
  }

  #card(candidate, choice, letter) {
    const item = element("li", { className: "item" });
    item.dataset.letter = letter;
    const title = element("h3", { id: `answer-${letter}`, textContent: `Answer ${letter}` });
    const up = element("button", { type: "button", className: "step", textContent: "↑", title: "Move up (Alt+↑)" });
    up.setAttribute("aria-label", `Move answer ${letter} up`);
    up.addEventListener("click", () => this.#change(candidate, move, -1));
    const down = element("button", { type: "button", className: "step", textContent: "↓", title: "Move down (Alt+↓)" });
    down.setAttribute("aria-label", `Move answer ${letter} down`);
    down.addEventListener("click", () => this.#change(candidate, move, 1));
    const tie = element("button", { type: "button", className: "tie", title: "Tie with the one above (T)" });
    tie.setAttribute("aria-label", `Tie answer ${letter} with the one above`);
    tie.addEventListener("click", () => this.#change(candidate, toggleTie));

    const head = element("div", { className: "card-head" });
    const grip = element("span", { className: "grip" });
    grip.setAttribute("aria-hidden", "true");
    head.append(grip, element("span", { className: "place" }), title, up, down);
    const box = element("div", { className: "card", tabIndex: 0 });
    box.setAttribute("role", "group");
    box.setAttribute("aria-labelledby", title.id);
    box.setAttribute("aria-describedby", "how");
    box.dataset.candidate = candidate;
    box.append(head, answerText(choice));
    if (choice.finish_reason === "length") {
      box.append(element("p", { className: "cut", textContent: "Cut off at the token limit." }));
    }
    item.append(tie, box);
    return item;
  }

  #render() {
    const groups = this.#arrangement.groups;
    const order = groups.flat();
    this.#list.classList.toggle("frozen", this.#frozen);
    this.#list.replaceChildren(...order.map((candidate) => this.#items[candidate]));
    for (const [position, candidate] of order.entries()) {
      const item = this.#items[candidate];
      const at = groupOf(groups, candidate);
      const tied = groups[at].indexOf(candidate) > 0;
      item.classList.toggle("tied", tied);
      item.querySelector(".place").textContent = String(at + 1);
      const tie = item.querySelector(".tie");
      tie.textContent = tied ? "tied" : "tie";
      tie.setAttribute("aria-pressed", String(tied));
      tie.disabled = this.#frozen || position === 0;
      const [up, down] = item.querySelectorAll(".step");
      up.disabled = this.#frozen || (position === 0 && groups[0].length === 1);
      down.disabled = this.#frozen || (position === order.length - 1 && groups[at].length === 1);
    }
  }

  #letter(candidate) {
    return this.#items[candidate].dataset.letter;
  }

  #where(candidate) {
    const groups = this.#arrangement.groups;
    const at = groupOf(groups, candidate);
    const others = groups[at].filter((other) => other !== candidate).map((other) => this.#letter(other));
    const ties = others.length ? `, tied with ${others.join(" and ")}` : "";
    return `Answer ${this.#letter(candidate)}: place ${at + 1} of ${groups.length}${ties}.`;
  }

  #spoken() {
    const groups = this.#arrangement.groups.map((group) => group.map((c) => this.#letter(c)).join(" tied with "));
    return `Order: ${groups.join(", then ")}.`;
  }

  #onKey(event) {
    const box = event.target.closest(".item")?.querySelector(".card");
    if (!box) return;
    const candidate = Number(box.dataset.candidate);
    const plain = !event.altKey && !event.ctrlKey && !event.metaKey;
    if (event.altKey && event.key === "ArrowUp") this.#change(candidate, move, -1);
    else if (event.altKey && event.key === "ArrowDown") this.#change(candidate, move, 1);
    else if (plain && event.key.toLowerCase() === "t") this.#change(candidate, toggleTie);
    else if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") this.undo();
    else return;
    event.preventDefault();
  }

  // A drag starts on a card's head, follows the pointer, shows where the card would land, and ends in `place`.
  #onPointerDown(event) {
    const head = event.target.closest(".card-head");
    if (this.#frozen || !head || event.button !== 0 || event.target.closest("button")) return;
    event.preventDefault();
    const box = head.parentElement;
    const candidate = Number(box.dataset.candidate);
    const startY = event.pageY;
    let position = null;
    const drag = new AbortController();
    const finish = (drop) => {
      drag.abort();
      box.classList.remove("dragged");
      box.style.transform = "";
      this.#mark(null);
      if (drop && position !== null) this.#change(candidate, place, position);
    };
    const onMove = (to) => {
      if (to.pointerId !== event.pointerId) return;
      box.style.transform = `translateY(${to.pageY - startY}px)`;
      position = this.#positionAt(to.clientY, candidate);
      this.#mark(position, candidate);
      scrollNearEdge(to.clientY);
    };
    const listen = (type, handler) => document.addEventListener(type, handler, { signal: drag.signal });
    box.classList.add("dragged");
    box.focus({ preventScroll: true });
    listen("pointermove", onMove);
    listen("pointerup", () => finish(true));
    listen("pointercancel", () => finish(false));
    listen("keydown", (pressed) => pressed.key === "Escape" && finish(false));
  }

  // How many of the other cards have their middle above `clientY`.
  #positionAt(clientY, candidate) {
    return this.#others(candidate).filter((item) => {
      const { top, height } = card(item).getBoundingClientRect();
      return clientY > top + height / 2;
    }).length;
  }

  #others(candidate) {
    return [...this.#list.children].filter((item) => item !== this.#items[candidate]);
  }

  #mark(position, candidate) {
    for (const item of this.#list.children) item.classList.remove("drop-before", "drop-after");
    if (position === null) return;
    const others = this.#others(candidate);
    if (position < others.length) others[position].classList.add("drop-before");
    else others.at(-1).classList.add("drop-after");
  }
}

function answerText(choice) {
  const text = choice.message.content?.trim() ?? "";
  const box = element("div", { className: "answer-text", textContent: text || "(an empty answer)" });
  box.classList.toggle("empty", text === "");
  return box;
}

// A long answer is folded, with a button that opens it, so that the order stays in sight.
function foldIfLong(item) {
  const text = item.querySelector(".answer-text");
  if (text.scrollHeight <= text.clientHeight + 1) return;
  const button = element("button", { type: "button", className: "quiet more", textContent: "Show all" });
  button.setAttribute("aria-expanded", "false");
  button.addEventListener("click", () => {
    const open = text.classList.toggle("open");
    button.textContent = open ? "Show less" : "Show all";
    button.setAttribute("aria-expanded", String(open));
  });
  text.classList.add("folded");
  text.after(button);
}

function slide(items, before) {
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  items.forEach((item, i) => {
    const by = before[i] - item.getBoundingClientRect().top;
    if (by) item.animate([{ transform: `translateY(${by}px)` }, { transform: "none" }], { duration: 160, easing: "ease-out" });
  });
}

function scrollNearEdge(clientY) {
  if (clientY < EDGE) scrollBy(0, -12);
  else if (clientY > innerHeight - EDGE) scrollBy(0, 12);
}

const card = (item) => item.querySelector(".card");

const element = (tag, properties) => Object.assign(document.createElement(tag), properties);
