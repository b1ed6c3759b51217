// One view of a page: node report_screenshot.mjs PAGE PNG WIDTH HEIGHT SCALE light|dark
// Run it where `npm install puppeteer-core @sparticuz/chromium` has been run.
import {createRequire} from 'node:module';
import {pathToFileURL} from 'node:url';

const here = createRequire(process.cwd() + '/');
const load = async name => (await import(pathToFileURL(here.resolve(name)))).default;
const [file, png, width, height, scale, scheme] = process.argv.slice(2);
const chromium = await load('@sparticuz/chromium'), puppeteer = await load('puppeteer-core');
const browser = await puppeteer.launch({args: [...chromium.args, '--no-sandbox'],
                                        executablePath: await chromium.executablePath(), headless: 'shell'});
try {
  const page = await browser.newPage();
  await page.setViewport({width: +width, height: +height, deviceScaleFactor: +scale});
  await page.emulateMediaFeatures([{name: 'prefers-color-scheme', value: scheme}]);
  await page.goto(pathToFileURL(file).href, {waitUntil: 'load'});
  await page.screenshot({path: png});
} finally {
  await browser.close();
}
