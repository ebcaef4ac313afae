/* The search page shows a few words of each hit. A hit on a label leads to an empty span
   in front of its heading, of which there are no words to show, and Sphinx's script then
   stops with an error: give it the words of the page instead. */
(() => {
  "use strict";

  if (typeof Search === "undefined") return; // not the search page
  const textOf = Search.htmlToText;
  Search.htmlToText = (html, anchor) => textOf(html, anchor) || textOf(html);
})();
