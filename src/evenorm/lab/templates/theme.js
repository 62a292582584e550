// Before the first paint: the theme that the reader chose here last time, if any.
"use strict";
try {
  const chosen = localStorage.getItem("evenorm-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // No storage for this page: the system's theme it is.
}
