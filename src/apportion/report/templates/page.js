"use strict";
// What the pages of a report share. One rule above all: text from a corpus reaches the page through textContent and text
// nodes, never as HTML.
const page = (() => {
  const byId = (id) => document.getElementById(id);
  const make = (tag, name = "", text = null) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== null) node.textContent = text;
    return node;
  };
  const number = new Intl.NumberFormat("en");

  // ---- blocks: base64 -> inflate -> JSON header and typed arrays ------------------------------------------------

  const arrayOf = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i2: Int16Array, i4: Int32Array, f4: Float32Array, f8: Float64Array };

  function bytesOf(base64) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
    const binary = atob(base64);
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    return bytes;
  }

  async function inflate(name) {
    try {
      const bytes = bytesOf(byId("block-" + name).textContent);
      return await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
    } catch {
      throw new Error(`its part “${name}” is missing or damaged. The file may have been cut off: please write the report again.`);
    }
  }

  async function unpack(name) {
    const buffer = await inflate(name);
    const size = new DataView(buffer).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
    const block = { plain: header.plain };
    for (const [key, [kind, offset, count]] of Object.entries(header.arrays)) {
      // The header's length makes the data begin at a multiple of 8, so views need no copy.
      block[key] = new arrayOf[kind](buffer, 4 + size + offset, count);
    }
    return block;
  }

  // ---- tokens ---------------------------------------------------------------------------------------------------

  // Controls, bidirectional marks, zero-width and unusual spaces: they would hide, or turn the text around them about.
  const hiddenCharacter = /[\u0000-\u001f\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u2000-\u200b\u200e\u200f\u2028-\u202f\u205f-\u206f\u3000\u3164\ufeff\uffa0\ufff0-\ufffb\u{e0000}-\u{e0fff}]/u;
  // Joiners and variation selectors are part of many scripts and of emoji: shown only where they stand alone.
  const joiner = /[\u200c\u200d\ufe00-\ufe0f]/u;
  const signs = { "\n": "↵", "\r": "␍", "\t": "⇥" };
  const longest = 120;

  function write(node, text, chip = false) {
    if (text.length > longest) text = text.slice(0, longest) + "…";
    const alone = text.length <= 2;
    let plain = "";
    const flush = () => {
      if (plain) node.append(plain);
      plain = "";
    };
    const blank = /^ +$/.test(text);
    let leading = true;
    for (const character of text) {
      const isSpace = character === " ";
      if (isSpace && (blank || (chip && leading))) {
        flush();
        node.append(make("span", "ws", "·"));
      } else if (signs[character]) {
        flush();
        node.append(make("span", "ws", signs[character]));
      } else if (joiner.test(character) ? alone : hiddenCharacter.test(character)) {
        flush();
        node.append(make("span", "code", character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")));
      } else {
        plain += character;
      }
      leading &&= isSpace || character in signs;
    }
    flush();
    if (text === "") node.append(make("span", "code", "empty"));
    return node;
  }

  // ---- numbers --------------------------------------------------------------------------------------------------

  function digits(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    const text = size >= 1000 ? number.format(Math.round(value)) : size >= 0.001 ? Number(value.toPrecision(3)).toString() : value.toExponential(1);
    return text.replace("-", "−");
  }
  // ---- colours --------------------------------------------------------------------------------------------------

  function keep(name, value) {
    try {
      localStorage.setItem("apportion-" + name, value);
    } catch {
      // A browser may forbid storage for files; the choice then lasts as long as the page.
    }
  }
  function kept(name) {
    try {
      return localStorage.getItem("apportion-" + name);
    } catch {
      return null;
    }
  }

  function setTheme(theme) {
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    byId("theme").textContent = { light: "☀", dark: "☾" }[theme] ?? "◐";
    keep("theme", theme);
  }
  function nextTheme() {
    const all = ["system", "light", "dark"];
    setTheme(all[(all.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % 3]);
  }

  return { byId, make, number, unpack, write, digits, keep, kept, setTheme, nextTheme };
})();
