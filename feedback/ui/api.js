// The server's HTTP API: the key, one function for each call, and errors that a person can read.

const STORED_KEY = "instructloop.key";
const PLAYGROUND = { "x-instructloop-source": "playground" };

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.name = "ApiError";
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(STORED_KEY),
  set: (value) => sessionStorage.setItem(STORED_KEY, value),
  forget: () => sessionStorage.removeItem(STORED_KEY),
};

// `/#key=il-...` opens the page with a key. A fragment never reaches a server or its log; it leaves the
// address bar at once, so that a bookmark, a screenshot or the history does not keep it. True if there was one.
export function takeKeyFromAddress() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (!given) return false;
  key.set(given.trim());
  history.replaceState(null, "", location.pathname + location.search);
  return true;
}

export const getConsent = () => json("GET", "/v1/consent");

export const putConsent = (granted, noticeVersion, erase = false) =>
  json("PUT", "/v1/consent", { body: { granted, notice_version: noticeVersion, erase } });

export const listModels = async () => (await json("GET", "/v1/models")).data;

export const servingRelease = async () => (await json("GET", "/v1/releases")).serving;

// -> {completion, release, recorded}. `notice` is the version of the notice that the person could read on the page.
export async function complete(request, notice, signal) {
  const headers = { ...PLAYGROUND, "x-instructloop-notice": notice };
  const response = await call("POST", "/v1/chat/completions", { body: request, headers, signal });
  const completion = await response.json();
  return {
    completion,
    release: response.headers.get("x-policy-release") ?? completion.system_fingerprint ?? "unknown",
    recorded: response.headers.get("x-instructloop-recorded") === "true",
  };
}

// The same `idempotencyKey` sent twice counts once.
export const rank = (ranking, idempotencyKey) =>
  json("POST", "/v1/feedback/rankings", { body: ranking, headers: { ...PLAYGROUND, "idempotency-key": idempotencyKey } });

async function json(method, path, options) {
  return (await call(method, path, options)).json();
}

async function call(method, path, { body, headers = {}, signal } = {}) {
  const request = { method, signal, cache: "no-store", headers: { ...headers, authorization: `Bearer ${key.get()}` } };
  if (body !== undefined) {
    request.headers["content-type"] = "application/json";
    request.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server could not be reached. Is it running?", 0);
  }
  if (!response.ok) throw new ApiError(await reason(response), response.status);
  return response;
}

async function reason(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}`.trim();
  }
}
