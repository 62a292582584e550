// The page's own behaviour: its data, the theme, the contents list, copying a command.
"use strict";
const report = JSON.parse(document.getElementById("report-data").textContent);

const dark = matchMedia("(prefers-color-scheme: dark)");

function theme() {
  return document.documentElement.dataset.theme || (dark.matches ? "dark" : "light");
}

// A custom property may hold light-dark(); only a used value says which of the two it is now.
const probe = document.body.appendChild(document.createElement("span"));
probe.hidden = true;
function color(expression) {
  probe.style.color = "";
  probe.style.color = expression;
  return getComputedStyle(probe).color;
}

function announceTheme() {
  document.dispatchEvent(new Event("themechange"));
}

document.getElementById("theme").addEventListener("click", () => {
  const next = theme() === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("evenorm-theme", next);
  } catch {
    // Without storage the choice lasts as long as the page.
  }
  announceTheme();
});
dark.addEventListener("change", announceTheme);

for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copies);
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = report.words.command_copied;
      setTimeout(() => { button.textContent = report.words.copy_command; }, 1600);
    } catch {
      getSelection().selectAllChildren(source); // no clipboard here: selected, one key press is left
    }
  });
}

const links = new Map([...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]));
const reading = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    for (const link of links.values()) link.removeAttribute("aria-current");
    links.get(entry.target.id)?.setAttribute("aria-current", "true");
  }
}, { rootMargin: "-20% 0px -70% 0px" });
for (const section of document.querySelectorAll(".opening, #verdicts, .section")) reading.observe(section);

let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const details of closed) details.open = true;
});
addEventListener("afterprint", () => {
  for (const details of closed) details.open = false;
});
