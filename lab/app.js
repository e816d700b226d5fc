// The browser's side of lab.app, run for two of its gr.HTML components.
// #spot: a click into the output becomes the value [across, down], from 0 to 1.
// #board: the label map; its value is what `board` in app.py makes. Ids are painted, not colours: a
// pixel has the class of the brush or keeps its own, so the edge of a stroke never makes a third.
if (element.closest('#spot')) {
  document.addEventListener('click', e => {
    const image = e.target.closest('#out img');
    if (!image || !element.offsetParent) return;
    const box = image.getBoundingClientRect(), [w, h] = [image.naturalWidth, image.naturalHeight];
    const zoom = Math.min(box.width / w, box.height / h);
    const place = [0.5 + (e.clientX - box.left - box.width / 2) / zoom / w,
                   0.5 + (e.clientY - box.top - box.height / 2) / zoom / h];
    if (place.some(p => p < 0 || p >= 1)) return;
    props.value = JSON.stringify(place);
    trigger('click');
  });
  return;
}
element.innerHTML = `<div><button data-tool=brush>Brush</button>
<button data-tool=fill>Fill an area</button><button data-tool=all>Fill everything</button>
<button data-tool=undo>Undo</button> <label>width <input type=range min=1 max=40 value=12></label>
</div><canvas width=1 height=1></canvas><div class=names></div>`;
const $ = s => element.querySelector(s), sheet = $('canvas'), pen = sheet.getContext('2d');
const table = new Uint32Array(256);
let map = {}, ids = null, sent = null, id = 0, tool = 'brush', before = [], last = null;
function draw() {
  const image = pen.createImageData(map.w, map.h), pixels = new Uint32Array(image.data.buffer);
  ids.forEach((k, i) => pixels[i] = table[k]);
  pen.putImageData(image, 0, 0);
}
function mark() {
  element.querySelectorAll('[data-tool]').forEach(
    b => b.classList.toggle('on', b.dataset.tool === tool));
  element.querySelectorAll('[data-id]').forEach(
    b => b.classList.toggle('on', +b.dataset.id === id));
}
function load() {
  if (!props.value || props.value === sent) return;
  map = JSON.parse(props.value);
  ids = Uint8Array.from(atob(map.ids), c => c.charCodeAt(0));
  [sheet.width, sheet.height, before, sent] = [map.w, map.h, [], props.value];
  sheet.style.backgroundImage = map.under ? `url(${map.under})` : 'none';
  table.fill(0xff808080);
  $('.names').replaceChildren(...map.palette.map(([k, name, c]) => {
    table[k] = (c[3] << 24 | c[2] << 16 | c[1] << 8 | c[0]) >>> 0;
    const button = document.createElement('button'), patch = document.createElement('i');
    patch.style.background = `rgba(${c[0]},${c[1]},${c[2]},${c[3] / 255})`;
    button.append(patch, name);
    button.dataset.id = k;
    button.onclick = () => { id = k; mark(); };
    return button;
  }));
  if (!map.palette.some(([k]) => k === id)) id = map.palette.at(-1)[0];
  if (map.under) id = 1;
  mark(); draw();
}
function disc(x, y) {
  const r = Math.max(0.71, $('input').value * map.w / 200);
  for (let j = Math.max(0, Math.floor(y - r)); j <= Math.min(map.h - 1, y + r); j++)
    for (let i = Math.max(0, Math.floor(x - r)); i <= Math.min(map.w - 1, x + r); i++)
      if ((i + 0.5 - x) ** 2 + (j + 0.5 - y) ** 2 <= r * r) ids[j * map.w + i] = id;
}
function stroke([x, y], [u, v]) {
  const n = Math.ceil(Math.max(1, Math.hypot(u - x, v - y)));
  for (let k = 0; k <= n; k++) disc(x + (u - x) * k / n, y + (v - y) * k / n);
  draw();
}
function fill([x, y]) {
  const todo = [Math.floor(y) * map.w + Math.floor(x)], old = ids[todo[0]];
  while (todo.length) {
    const p = todo.pop();
    if (old === id || ids[p] !== old) continue;
    ids[p] = id;
    if (p % map.w) todo.push(p - 1);
    if ((p + 1) % map.w) todo.push(p + 1);
    todo.push(p - map.w, p + map.w);
  }
  draw();
}
function send() {
  let text = '';
  ids.forEach(k => text += String.fromCharCode(k));
  sent = JSON.stringify({...map, ids: btoa(text)});
  props.value = sent;
  trigger('input');
}
const keep = () => before = [...before.slice(-19), ids.slice()];
function place(e) {
  const box = sheet.getBoundingClientRect(), to = (n, most) => Math.min(most - 0.01, Math.max(0, n));
  return [to((e.clientX - box.left) / box.width * map.w, map.w),
          to((e.clientY - box.top) / box.height * map.h, map.h)];
}
sheet.onpointerdown = e => {
  if (!ids) return;
  keep();
  if (tool === 'fill') { fill(place(e)); send(); return; }
  sheet.setPointerCapture(e.pointerId);
  stroke(last = place(e), last);
};
sheet.onpointermove = e => { if (last) stroke(last, last = place(e)); };
sheet.onpointerup = sheet.onpointercancel = () => { if (last) { last = null; send(); } };
element.querySelectorAll('[data-tool]').forEach(b => b.onclick = () => {
  const now = b.dataset.tool;
  if (!ids || (now === 'undo' && !before.length)) return;
  if (now === 'all') { keep(); ids.fill(id); } else if (now === 'undo') ids = before.pop();
  else tool = now;
  mark(); draw();
  if (now === 'all' || now === 'undo') send();
});
watch('value', load);
load();
