// Keys for the buttons, and a guard against pressing twice. Without this script the pages work by their buttons.
"use strict";
(() => {
  const SETTLE_MS = 400; // nobody has read a pair so soon: the second press of a double one, on the page that follows
  const shown = performance.now();
  const form = document.getElementById("rating");
  let sent = false;

  form?.addEventListener("submit", (event) => {
    if (sent || performance.now() - shown < SETTLE_MS) {
      event.preventDefault();
      return;
    }
    sent = true;
    setTimeout(() => { sent = false; }, 5000); // the server did not answer
  });

  // By place for the digits, which need a shift on some keyboards; by letter for the others.
  const keyOf = (event) => {
    const digit = /^(?:Digit|Numpad)([12])$/.exec(event.code);
    if (digit) return digit[1];
    if (event.key === " ") return event.shiftKey ? null : "space";
    return event.key.toLowerCase();
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
    if (event.key === " " && event.target.closest("button, a")) return; // what has the focus is pressed
    const key = keyOf(event);
    const target = [...document.querySelectorAll("[data-key]")].find((one) => one.dataset.key === key);
    if (!target) return;
    event.preventDefault();
    if (!event.repeat) target.click();
  });

  // A page out of the browser's memory may show a pair that has been rated since.
  window.addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });

  // Of a chat the last turns matter most.
  const prompt = document.getElementById("prompt-text");
  if (prompt && Number(prompt.dataset.turns) > 1) prompt.scrollTop = prompt.scrollHeight;
})();
