// Pictures of several sources over one connection: multipart, each part with its length and its source.

const FIRST_RETRY_MS = 1000;
const LONGEST_RETRY_MS = 10000;

/** Where `needle` (bytes) begins in `bytes`, or -1. */
function indexOf(bytes, needle) {
  for (let at = bytes.indexOf(needle[0]); at >= 0; at = bytes.indexOf(needle[0], at + 1)) {
    if (needle.every((byte, offset) => bytes[at + offset] === byte)) return at;
  }
  return -1;
}

const HEAD_END = [13, 10, 13, 10];

/** Yields {source, jpeg} as they come. */
async function* parts(reader) {
  let bytes = new Uint8Array(0);
  const more = async () => {
    const { value, done } = await reader.read();
    if (done) return false;
    const joined = new Uint8Array(bytes.length + value.length);
    joined.set(bytes);
    joined.set(value, bytes.length);
    bytes = joined;
    return true;
  };
  for (;;) {
    let end;
    while ((end = indexOf(bytes, HEAD_END)) < 0) if (!(await more())) return;
    const head = new TextDecoder().decode(bytes.subarray(0, end));
    const start = end + HEAD_END.length;
    const length = Number(/^content-length: (\d+)/im.exec(head)[1]);
    const source = decodeURIComponent(/^x-source: (\S+)/im.exec(head)[1]);
    while (bytes.length < start + length) if (!(await more())) return;
    yield { source, jpeg: bytes.slice(start, start + length) };
    bytes = bytes.slice(start + length);
  }
}

/** Keeps a connection to /video open, for all sources or one, and draws what comes. */
export class Video {
  #abort = null;
  #only = null;

  /** `draw(source, bitmap)`; `note(text)` says why there is no video, or null. */
  constructor(draw, note) {
    this.draw = draw;
    this.note = note;
  }

  /** Watches one source, or all where `only` is null. */
  start(only = null) {
    if (this.#abort && only === this.#only) return;
    this.stop();
    this.#only = only;
    this.#abort = new AbortController();
    this.#keep(only, this.#abort.signal);
  }

  stop() {
    this.#abort?.abort();
    this.#abort = null;
  }

  async #keep(only, signal) {
    const address = only === null ? "/video" : `/video?source=${encodeURIComponent(only)}`;
    let wait = FIRST_RETRY_MS;
    while (!signal.aborted) {
      try {
        const response = await fetch(address, { signal });
        if (response.ok) {
          this.note(null);
          for await (const { source, jpeg } of parts(response.body.getReader())) {
            // Awaited: a device too slow to decode reads no faster than it draws, and the server skips.
            const bitmap = await createImageBitmap(new Blob([jpeg], { type: "image/jpeg" }));
            if (signal.aborted) return;
            this.draw(source, bitmap);
            bitmap.close();
            wait = FIRST_RETRY_MS;
          }
        } else {
          this.note(response.status === 503 ? "No video: as many clients watch as may. The figures go on." : null);
        }
      } catch (error) {
        if (signal.aborted) return; // otherwise the connection broke, and the figures' connection says so
      }
      await new Promise((resolve) => setTimeout(resolve, wait));
      wait = Math.min(2 * wait, LONGEST_RETRY_MS);
    }
  }
}
