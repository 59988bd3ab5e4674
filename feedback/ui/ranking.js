// An order with ties: groups of candidates, the best group first. Pure functions, and a history for undo.
//
// `groups` is an array of arrays of candidates (any values, each once); those within one array are tied.

// Candidates 0..count-1 in a random order, no ties. `random` gives numbers in [0, 1).
export function shuffled(count, random = Math.random) {
  const order = [...Array(count).keys()];
  for (let i = count - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order.map((candidate) => [candidate]);
}

// One step up (-1) or down (+1). A tied candidate leaves its tie on that side; a single one passes the whole next group.
export function move(groups, candidate, step) {
  const at = groupOf(groups, candidate);
  const alone = groups[at].length === 1;
  const rest = without(groups, candidate);
  const target = alone ? at + step : step < 0 ? at : at + 1;
  if (target < 0 || target > rest.length) return groups;
  return [...rest.slice(0, target), [candidate], ...rest.slice(target)];
}

// Tie with the candidate above, or cut the tie with it. The first candidate has none above.
export function toggleTie(groups, candidate) {
  const at = groupOf(groups, candidate);
  const inside = groups[at].indexOf(candidate);
  if (inside > 0) {
    return [...groups.slice(0, at), groups[at].slice(0, inside), groups[at].slice(inside), ...groups.slice(at + 1)];
  }
  if (at === 0) return groups;
  return [...groups.slice(0, at - 1), [...groups[at - 1], ...groups[at]], ...groups.slice(at + 1)];
}

// Drop at `position` among the others, counted from the top: between two tied candidates it joins their tie.
export function place(groups, candidate, position) {
  if (groups.flat().indexOf(candidate) === position) return groups;
  const rest = without(groups, candidate);
  let above = 0;
  for (const [at, group] of rest.entries()) {
    if (position <= above) return [...rest.slice(0, at), [candidate], ...rest.slice(at)];
    if (position < above + group.length) {
      const joined = [...group.slice(0, position - above), candidate, ...group.slice(position - above)];
      return [...rest.slice(0, at), joined, ...rest.slice(at + 1)];
    }
    above += group.length;
  }
  return [...rest, [candidate]];
}

export const groupOf = (groups, candidate) => groups.findIndex((group) => group.includes(candidate));

const without = (groups, candidate) =>
  groups.map((group) => group.filter((other) => other !== candidate)).filter((group) => group.length > 0);

// The order now and before: `change` applies one of the functions above, `undo` takes the last one back.
export class Arrangement {
  #past = [];

  constructor(groups) {
    this.groups = groups;
  }

  get touched() {
    return this.#past.length > 0;
  }

  // True if the order became another one.
  change(step, ...args) {
    const next = step(this.groups, ...args);
    if (JSON.stringify(next) === JSON.stringify(this.groups)) return false;
    this.#past.push(this.groups);
    this.groups = next;
    return true;
  }

  undo() {
    if (!this.touched) return false;
    this.groups = this.#past.pop();
    return true;
  }
}
