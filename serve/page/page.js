"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const [photo, frame, drop, tokens] = ["photo", "frame", "drop", "tokens"].map(at);
  const [form, question, answer, facts, alarm] = ["form", "question", "answer", "facts", "alarm"].map(at);
  let image = null; // a data URI
  let shown = null; // what the last answer says of it
  let running = null; // an AbortController

  const say = (text) => { alarm.textContent = text || ""; alarm.hidden = !text; };

  // --- the image ---------------------------------------------------------------------------------

  function take(file) {
    if (!file) return;
    const reader = new FileReader();
    reader.onload = () => {
      photo.onload = () => {
        image = reader.result;
        say("");
        draw(null);
        at("caption").textContent = `${photo.naturalWidth} × ${photo.naturalHeight}`;
        frame.hidden = at("other").hidden = false;
        drop.hidden = true;
        at("before").replaceChildren();
        place();
      };
      photo.onerror = () => say(`${file.name || "This"} is no image that this browser shows.`);
      photo.src = reader.result;
    };
    reader.readAsDataURL(file);
  }

  // The picture is fitted into its frame; the drawing of tokens lies exactly on it.
  function place() {
    if (!photo.naturalWidth) return;
    const scale = Math.min(photo.clientWidth / photo.naturalWidth, photo.clientHeight / photo.naturalHeight);
    const [width, height] = [photo.naturalWidth * scale, photo.naturalHeight * scale];
    Object.assign(tokens.style, {
      left: `${(photo.clientWidth - width) / 2}px`, top: `${(photo.clientHeight - height) / 2}px`,
      width: `${width}px`, height: `${height}px`,
    });
  }

  // Everything is dark but the kept tokens: squares of a grid over a part of the image.
  function draw(seen) {
    shown = seen;
    tokens.replaceChildren();
    at("overlay").hidden = !seen;
    if (!seen || at("overlay").getAttribute("aria-pressed") !== "true") return;
    const [left, top, right, bottom] = seen.box;
    const [rows, columns] = seen.grid;
    const [wide, high] = [(right - left) / columns, (bottom - top) / rows];
    const squares = seen.kept.map(([row, column]) =>
      `M${left + column * wide} ${top + row * high}h${wide}v${high}h${-wide}z`).join("");
    for (const [kind, path] of [["dim", `M0 0H1V1H0z${squares}`], ["edge", squares]]) {
      const drawn = document.createElementNS("http://www.w3.org/2000/svg", "path");
      drawn.setAttribute("class", kind);
      drawn.setAttribute("d", path);
      tokens.append(drawn);
    }
  }

  for (const zone of [drop, frame]) {
    zone.addEventListener("dragover", (event) => { event.preventDefault(); zone.classList.add("over"); });
    zone.addEventListener("dragleave", () => zone.classList.remove("over"));
    zone.addEventListener("drop", (event) => {
      event.preventDefault();
      zone.classList.remove("over");
      take(event.dataTransfer.files[0]);
    });
  }
  addEventListener("paste", (event) => take(event.clipboardData.files[0]));
  addEventListener("resize", place);
  at("file").addEventListener("change", (event) => take(event.target.files[0]));
  at("other").addEventListener("click", () => at("file").click());
  at("overlay").addEventListener("click", (event) => {
    const pressed = event.target.getAttribute("aria-pressed") === "true";
    event.target.setAttribute("aria-pressed", String(!pressed));
    draw(shown);
  });

  // --- the question ------------------------------------------------------------------------------

  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      held += value;
      const whole = held.split("\n\n");
      held = whole.pop();
      for (const line of whole) if (line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }

  async function ask(text) {
    const parts = image ? [{ type: "image_url", image_url: { url: image } }] : [];
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      signal: running.signal,
      body: JSON.stringify({
        model: at("model").value, stream: true, stream_options: { include_usage: true }, visistage: true,
        max_tokens: Number(at("most").value) || null,
        messages: [{ role: "user", content: [...parts, { type: "text", text }] }],
      }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    const found = { usage: null, told: null };
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      answer.textContent += event.choices[0]?.delta.content ?? "";
      found.usage = event.usage ?? found.usage;
      found.told = event.visistage ?? found.told;
    }
    return found;
  }

  function summary({ usage, told }) {
    const { first_token_ms: first, per_token_ms: each } = told.timings;
    const words = [`${usage.completion_tokens} tokens`, `${first.toFixed(0)} ms to the first`];
    if (each !== null) words.push(`${each.toFixed(1)} ms each after it`);
    if (told.visual_tokens) words.push(`${told.kept_tokens} of ${told.visual_tokens} visual tokens kept (${told.plan})`);
    return words.join(", ");
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = question.value.trim() || question.placeholder;
    if (running) return;
    running = new AbortController();
    say("");
    draw(null);
    answer.textContent = facts.textContent = "";
    answer.classList.add("busy");
    at("ask").disabled = true;
    at("stop").hidden = false;
    try {
      const found = await ask(text);
      if (found.told.images.length) draw(found.told.images[0]);
      facts.textContent = summary(found);
      const line = document.createElement("li");
      const asked = document.createElement("span");
      asked.textContent = `${text} (${found.told.timings.first_token_ms.toFixed(0)} ms)`;
      line.append(asked, answer.textContent || "(no text)");
      at("before").prepend(line);
    } catch (error) {
      if (error.name === "AbortError") facts.textContent = "stopped";
      else say(error.message);
    } finally {
      running = null;
      answer.classList.remove("busy");
      at("ask").disabled = false;
      at("stop").hidden = true;
    }
  });
  at("stop").addEventListener("click", () => running?.abort());
  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); form.requestSubmit(); }
  });
  at("address").textContent = location.origin;
})();
