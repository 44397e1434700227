// The page: asks for images, and draws what the server tells of them while it makes them. Texts of the server are set
// as text, never as markup.

const $ = (id) => document.getElementById(id);
const PREVIEWS = 12;
let models = [];
let stop = null;

const headers = () => ($("key").value ? { Authorization: `Bearer ${$("key").value}` } : {});
const say = (words, isError = false) => {
  $("status").textContent = words;
  $("status").classList.toggle("error", isError);
};
const chosen = () => models.find((model) => model.id === $("model").value);

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answers ${response.status}`;
  }
}

async function loadModels() {
  const response = await fetch("/v1/models", { headers: headers() });
  $("key-field").hidden = response.status !== 401 && !$("key").value;
  if (!response.ok) {
    say(await failure(response), true);
    return;
  }
  const before = $("model").value;
  models = (await response.json()).data;
  $("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
  if (models.some((model) => model.id === before)) $("model").value = before;
  showModel();
  const loading = models.some((model) => model.state === "loading");
  say(loading ? "Loading the engines" : "Ready");
  if (loading) setTimeout(loadModels, 1000);
}

function showModel() {
  const model = chosen();
  if (!model) return;
  const takes = model.takes;
  $("prompt-field").hidden = takes === null;
  $("prompt").required = takes !== null;
  const isLabel = takes === "class_label";
  $("prompt-words").textContent = isLabel ? `Class, 0 to ${model.classes - 1}` : "Prompt";
  $("prompt").inputMode = isLabel ? "numeric" : "text";
  if (isLabel && !/^\d+$/.test($("prompt").value)) $("prompt").value = "0";
}

function drawRun(quality, count) {
  const section = document.createElement("section");
  const [title, steps, facts, images] = ["h2", "ol", "p", "div"].map((tag) => document.createElement(tag));
  title.textContent = quality;
  steps.className = "steps";
  images.className = "images";
  (chosen().schedules[quality] ?? []).forEach((variant, step) => {
    const mark = document.createElement("li");
    mark.className = variant === 0 ? "full" : "cached";
    mark.title = `step ${step}: ${variant === 0 ? "full" : `cached-${variant}`}`;
    steps.append(mark);
  });
  for (let number = 0; number < count; number += 1) {
    const image = document.createElement("img");
    image.alt = `Image ${number + 1}, not begun`;
    images.append(image);
  }
  section.append(title, steps, facts, images);
  $("runs").append(section);
  return {
    facts,
    step(reached) {
      [...steps.children].forEach((mark, step) => {
        mark.classList.toggle("done", step < reached);
        mark.classList.toggle("now", step === reached);
      });
    },
    image(number, data, isDone) {
      const image = images.children[number];
      image.src = `data:image/png;base64,${data}`;
      image.alt = `Image ${number + 1}, ${isDone ? "done" : "unfinished"}`;
    },
  };
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((each) => each.startsWith("data: "));
      if (line) yield JSON.parse(line.slice(6));
    }
  }
}

async function make(quality, signal) {
  const count = Number($("count").value);
  const body = { model: $("model").value, seed: Number($("seed").value), n: count, quality, stream: true };
  body.partial_images = PREVIEWS;
  if (chosen().takes !== null) body.prompt = $("prompt").value;
  const run = drawRun(quality, count);
  const start = performance.now();
  run.facts.textContent = "waits";
  const response = await fetch("/v1/images/generations", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw new Error(await failure(response));
  let first = null;
  for await (const event of eventsOf(response)) {
    const seconds = ((performance.now() - start) / 1000).toFixed(2);
    if (event.type === "error") throw new Error(event.error.message);
    if (event.step) {
      first ??= seconds;
      run.step(event.step);
      run.facts.textContent = `${seconds} s, first step after ${first} s`;
    }
    if (event.b64_json) run.image(event.picture, event.b64_json, event.type.endsWith("completed"));
    if (event.type.endsWith(".done")) {
      run.facts.textContent = `${seconds} s; ${event.steps_full} steps full, ${event.steps_cached} cached; seed ${event.seed}`;
    }
  }
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (stop || !chosen()) return;
  stop = new AbortController();
  $("go").disabled = true;
  $("stop").disabled = false;
  $("runs").replaceChildren();
  say("Making");
  try {
    const wanted = $("quality").value;
    for (const quality of wanted === "both" ? ["standard", "hd"] : [wanted]) await make(quality, stop.signal);
    say("Done");
  } catch (error) {
    say(error.name === "AbortError" ? "Stopped" : error.message, error.name !== "AbortError");
  }
  stop = null;
  $("go").disabled = false;
  $("stop").disabled = true;
});
$("stop").addEventListener("click", () => stop?.abort());
$("model").addEventListener("change", showModel);
$("key").addEventListener("change", loadModels);
loadModels();
