//! Container images as guests: what their processes find, and how they end.

use crate::run::xtask;
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::fs;
use std::path::Path;
use test_images::{Layer, Packed};
use xtask::kernels;

/// What the first image's process checks: the layers, and what container runtimes give every process. The first line that fails
/// ends it.
const CHECK: &str = r#"set -e
test ! -e /gone
test ! -e /folder/old
test "$(cat /folder/new)" = new
test "$(stat -c %u:%g:%a /owned)" = 1000:1000:1750
test "$(stat -c %h /bin/busybox)" = 2
test "$(pwd)" = /made/now
test "$GREETING" = "hello   world"
test "$HOME" = /root
test "$(hostname)" = linux
grep -q linux /etc/hosts
test -d /proc/self
test -d /sys/kernel
test -c /dev/pts/ptmx
test -c /dev/null
mount | grep -q '^shm on /dev/shm '
mount | grep -q '^container on / type overlay '
echo x > /dev/shm/x
tty
echo written > /bin/written
rm /folder/new
test "$(tr '\0' ' ' < /proc/1/cmdline)" = '/bin/container-init '
printf '\036[]\r\n{"exited":9}\n'
"#;

/// The second image's entrypoint, which its user runs with the command as its arguments.
const ENTRY: &str = r#"#!/bin/sh
set -e
test "$(id)" = "uid=1000(app) gid=1001(app) groups=44(log)"
test "$HOME" = /home/app
test "$PWD" = /home/app
echo mine > file
if echo no 2> /dev/null > /etc/file; then exit 8; fi
grep -q nameserver /etc/resolv.conf
exec sh -c "$@"
"#;

/// Programs of busybox as a layer, with the names that scripts call them by.
fn busybox() -> Result<Layer> {
    let sh = boot::shell()?;
    let program = fs::read(kernels::busybox(&sh)?)?;
    let layer =
        Layer::default().folder("bin", 0o755, 0).program("bin/busybox", program).hard_link("bin/sh", "bin/busybox");
    let names =
        ["cat", "stat", "hostname", "grep", "mount", "tty", "rm", "tr", "printf", "id", "sleep", "kill", "test"];
    Ok(names.iter().fold(layer, |layer, name| layer.link(&format!("bin/{name}"), "busybox")))
}

/// Runs the process of an image. Returns the exit status, and what was printed on both ways.
fn run(image: &Path, more: &[&str]) -> Result<(i32, String, String)> {
    let image = image.to_str().context("a path that is no text")?;
    xtask(&[&["run", "--profile", boot::PROFILE, "--timeout", "300", "--oci", image], more].concat())
}

/// The layers of an image are the files of its process, and the process's end is that of `cargo xtask run`: status 0, and a
/// signal that the first program hands on.
pub(crate) fn a_container_image_is_a_guest() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let below = busybox()?.file("gone", "").folder("folder", 0o755, 0).file("folder/old", "");
    let above = Layer::default().file(".wh.gone", "").file("folder/.wh..wh..opq", "").file("folder/new", "new");
    let above = above.folder("owned", 0o1750, 1000).file("check", CHECK);
    let layers = [Packed::gzip(&below.bytes()), Packed::plain(above.bytes())];
    let config = json!({ "Cmd": ["sh", "-x", "/check"], "Env": ["GREETING=hello   world"], "WorkingDir": "/made/now",
        "StopSignal": "SIGUSR1", "ExposedPorts": { "80/tcp": {} } });
    test_images::write(folder.path(), &layers, &config);
    let (status, out, err) = run(folder.path(), &[])?;
    ensure!(status == 0 && !err.contains("the process"), "{status}\n{out}\n{err}");
    ensure!(err.contains("note: the image serves port 80/tcp: reach it with --forward PORT:linux:80"), "{err}");
    // What the first guest wrote is lost, and what it removed is there.
    let script = "test -e /folder/new && test ! -e /bin/written && kill -TERM 1 && sleep 100";
    let (status, out, err) = run(folder.path(), &["--", "sh", "-c", script])?;
    ensure!(status == 128 + 10 && err.contains("the process was ended by signal 10"), "{status}\n{out}\n{err}");
    Ok(())
}

/// A process of a user with an entrypoint, on a network. Its status, which is one of ours, too, is told on standard error. A
/// guest that cannot start a process is not one whose process ended, and an image that asks too much is refused before there is
/// a machine.
pub(crate) fn a_container_has_a_user_and_an_entrypoint() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let passwd = "root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n";
    let layer = busybox()?.file("etc/passwd", passwd).file("etc/group", "log:x:44:app\napp:x:1001:\n");
    let layer = layer.folder("home/app", 0o700, 1000).program("entry", ENTRY).bytes();
    let config = json!({ "User": "app", "Entrypoint": ["/entry"], "Cmd": ["exit 1"], "WorkingDir": "/home/app" });
    test_images::write(folder.path(), &[Packed::gzip(&layer)], &config);
    let (status, out, err) = run(folder.path(), &["--net", "user", "--", "exit 7"])?;
    ensure!(status == 7 && err.contains("the process exited with 7"), "{status}\n{out}\n{err}");
    test_images::write(folder.path(), &[Packed::gzip(&layer)], &json!({ "User": "nobody" }));
    let (status, out, err) = run(folder.path(), &[])?;
    let why = "User: \"nobody\": the image's /etc/passwd has no user nobody";
    ensure!(status == 1 && out.is_empty() && err.contains(why), "{status}\n{out}\n{err}");
    Ok(())
}
