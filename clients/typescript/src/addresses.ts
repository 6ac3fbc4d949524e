/** Addresses of services as people write them. */

const ADDRESS = /^(unix:.+|(dns:\/\/\/)?([^\s:/[\]@]+|\[[0-9A-Fa-f:.%\w]+\]):(?<port>[0-9]{1,5}))$/;

/** The address of a service as it is. Throws RangeError, saying what one looks like; nothing is looked up. */
export function checkAddress(text: string): string {
  const parts = ADDRESS.exec(text);
  const port = parts?.groups?.port;
  if (!parts || (port !== undefined && !(Number(port) > 0 && Number(port) < 65_536))) {
    throw new RangeError(`'${text}' is no address: it must be HOST:PORT, [IPV6]:PORT or unix:PATH`);
  }
  return text;
}
