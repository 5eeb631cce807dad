//! Images from layers that the tests make: what a guest would find on its disk, and what is refused.

use super::layout::Layout;
use super::tree::Tree;
use super::{archive, config, open, read};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use tar::EntryType;
use test_images::{Layer, Packed};
use test_random::Random;

/// The files of an image with these layers, in the order in which they are unpacked: path, kind, content or target.
fn files(layers: &[Vec<u8>]) -> Result<Vec<String>, String> {
    archive_of(layers).map(|bytes| listed(&bytes)).map_err(|why| format!("{why:#}"))
}

fn archive_of(layers: &[Vec<u8>]) -> anyhow::Result<Vec<u8>> {
    let (mut tree, mut opened, mut out) = (Tree::default(), Vec::new(), Vec::new());
    for (number, layer) in layers.iter().enumerate() {
        tree.apply(number, &layer[..])?;
        let mut file = tempfile::tempfile()?;
        file.write_all(layer)?;
        opened.push(file);
    }
    archive::Writer::new(&tree, &mut opened, false, &mut out).write()?;
    let needs = archive::needs(&tree, false)?;
    assert!(needs.files > 0 && needs.bytes >= 4096);
    Ok(out)
}

fn listed(bytes: &[u8]) -> Vec<String> {
    let mut archive = tar::Archive::new(bytes);
    let line = |mut entry: tar::Entry<'_, &[u8]>| {
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let target = String::from_utf8_lossy(&entry.link_name_bytes().unwrap_or_default()).into_owned();
        match entry.header().entry_type() {
            EntryType::Directory => format!("{path}/"),
            EntryType::Symlink => format!("{path} -> {target}"),
            EntryType::Link => format!("{path} = {target}"),
            EntryType::Regular => {
                let mut text = String::new();
                entry.read_to_string(&mut text).unwrap();
                format!("{path} {text}")
            }
            other => format!("{path} {other:?}"),
        }
    };
    archive.entries().unwrap().map(|entry| line(entry.unwrap())).collect()
}

fn layer() -> Layer {
    Layer::default()
}

#[test]
fn layers_lie_over_each_other() {
    let below = layer().folder("a", 0o755, 0).file("a/x", "old").file("a/y", "y").file("b", "b").folder("c", 0o755, 0);
    let above = layer().file("./a/x", "new").file("/d/e/f", "deep").file("c", "now a file").folder("b", 0o700, 0);
    let found = files(&[below.bytes(), above.bytes()]).unwrap();
    assert_eq!(
        found,
        ["./", "./a/", "./a/x new", "./a/y y", "./b/", "./c now a file", "./d/", "./d/e/", "./d/e/f deep"]
    );
}

/// OCI image-spec, "Whiteouts": they hide what lower layers have, wherever they stand in their own layer.
#[test]
fn whiteouts_hide_what_is_below() {
    let below = || {
        let folders = layer().folder("a", 0o755, 0).folder("a/b", 0o755, 0);
        folders.file("a/b/x", "x").file("a/y", "y").file("z", "z").bytes()
    };
    let found = |above: Layer| files(&[below(), above.bytes()]).unwrap()[1..].join(", ");
    assert_eq!(found(layer().file(".wh.z", "").file("a/.wh.b", "")), "./a/, ./a/y y");
    assert_eq!(found(layer().file(".wh.a", "")), "./z z");
    let opaque = "./a/, ./a/b/, ./a/b/new new, ./z z";
    assert_eq!(found(layer().file("a/.wh..wh..opq", "").file("a/b/new", "new")), opaque);
    assert_eq!(found(layer().file("a/b/new", "new").file("a/.wh..wh..opq", "")), opaque);
    // A file may be taken away and come back in one layer.
    for again in [layer().file(".wh.z", "").file("z", "2"), layer().file("z", "2").file(".wh.z", "")] {
        assert_eq!(found(again), "./a/, ./a/b/, ./a/b/x x, ./a/y y, ./z 2");
    }
    // Nothing is there to be taken away; and these are notes, no files.
    let nothing = layer().file(".wh.none", "").file("no/such/.wh.x", "").folder(".wh..wh.plnk", 0o700, 0);
    assert_eq!(found(nothing), "./a/, ./a/b/, ./a/b/x x, ./a/y y, ./z z");
    for bad in [".wh.", ".wh..", ".wh..."] {
        let why = files(&[below(), layer().file(bad, "").bytes()]).unwrap_err();
        assert!(why.contains("a whiteout of no name"), "{bad}: {why}");
    }
}

#[test]
fn links_are_kept() {
    let below = layer().file("a", "a").hard_link("b", "a").hard_link("c", "./b").link("l", "/a/../x").link("m", "none");
    let above = layer().file(".wh.a", "").file("c", "c");
    assert_eq!(
        files(&[below.bytes(), above.bytes()]).unwrap(),
        ["./", "./b a", "./c c", "./l -> /a/../x", "./m -> none"]
    );
    let two = layer().file("a", "a").hard_link("z/b", "a").bytes();
    assert_eq!(files(&[two]).unwrap(), ["./", "./a a", "./z/", "./z/b = ./a"]);
    let long = "n".repeat(200);
    let deep: String = format!("{}/", "d".repeat(60)).repeat(4);
    let far = layer().link("link", &long[..99]).file(&deep[..98], "x").bytes();
    let over = layer().folder(&deep[..61], 0o755, 0).bytes();
    assert_eq!(files(&[far, over]).unwrap()[2..].len(), 2);
}

/// A path of an image leads nowhere but into the image, whatever links are there.
#[test]
fn no_path_leads_out_of_the_image() {
    for bad in ["../x", "a/../../x", "..", "/../x", "a/.."] {
        let why = files(&[layer().file(bad, "").bytes()]).unwrap_err();
        assert!(why.contains("a path that leads out of the image") && why.contains(bad), "{bad}: {why}");
    }
    let out = |target: &str| layer().folder("in", 0o755, 0).link("in/out", target).file("in/out/x", "x").bytes();
    for (target, found) in [
        ("/", "./, ./in/, ./in/out -> /, ./x x"),
        ("../../../..", "./, ./in/, ./in/out -> ../../../.., ./x x"),
        ("/etc", "./, ./etc/, ./etc/x x, ./in/, ./in/out -> /etc"),
        ("..", "./, ./in/, ./in/out -> .., ./x x"),
    ] {
        assert_eq!(files(&[out(target)]).unwrap().join(", "), found);
    }
    let around = layer().link("a", "b").link("b", "a").file("a/x", "");
    assert!(files(&[around.bytes()]).unwrap_err().contains("links that lead to links without end"));
    let why = files(&[layer().hard_link("passwd", "../../etc/passwd").bytes()]).unwrap_err();
    assert!(why.contains("a path that leads out of the image"), "{why}");
    let why = files(&[layer().hard_link("passwd", "/etc/passwd").bytes()]).unwrap_err();
    assert!(why.contains("a hard link to a file that is not there"), "{why}");
    // A layer does not write to where a link of a lower one leads on this machine.
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().to_str().unwrap();
    files(&[layer().link("l", target).bytes(), layer().file("l/x", "x").bytes()]).unwrap();
    assert_eq!(fs::read_dir(target).unwrap().count(), 0);
}

#[test]
fn what_is_no_layer_is_refused() {
    let deep = "d/".repeat(40);
    // Each folder is made by way of a link to the last one of those before.
    let nested = (0..8).fold(layer().folder(&deep, 0o755, 0), |layer, number| {
        let below = if number == 0 { String::new() } else { format!("l{}/", number - 1) };
        layer.link(&format!("l{number}"), &format!("{below}{deep}")).folder(&format!("l{number}/{deep}"), 0o755, 0)
    });
    for (bytes, why) in [
        (layer().file("a", "").file("a/b", "").bytes(), "below a file that is no folder"),
        (layer().folder("a", 0o755, 0).hard_link("b", "a").bytes(), "a hard link to a folder"),
        (layer().link("a", "").bytes(), "a link that leads nowhere"),
        (layer().entry(EntryType::new(b'Z'), "a", 0, 0, b"", "").bytes(), "a file of the unknown kind 'Z'"),
        (layer().entry(EntryType::Regular, ".", 0, 0, b"", "").bytes(), "no folder, but the topmost"),
        (layer().attributes(&[("user.x", &[0; 4000])]).file("a", "").bytes(), "4006 bytes of extended attributes"),
        (vec![0xff; 1024], "a damaged tar file"),
        (nested.bytes(), "folders that are 256 deep in each other"),
    ] {
        let refusal = files(&[bytes]).unwrap_err();
        assert!(refusal.contains(why), "{refusal} is not: {why}");
    }
}

#[test]
fn owners_modes_and_attributes_are_kept() {
    let all = layer().folder(".", 0o700, 7).attributes(&[("user.note", b"\0\xff"), ("trusted.x", b"x")]);
    let all = all.folder("home", 0o1750, 100_000).program("run", "x");
    let all = all.entry(EntryType::Char, "null", 0o666, 0, b"", "");
    let bytes = archive_of(&[all.bytes()]).unwrap();
    let mut archive = tar::Archive::new(&bytes[..]);
    let mut lines = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let header = entry.header().clone();
        let attributes: Vec<_> = entry.pax_extensions().unwrap().into_iter().flatten().collect();
        let attributes: Vec<_> = attributes.into_iter().map(|it| it.unwrap().key().unwrap().to_owned()).collect();
        let (mode, uid, mtime) = (header.mode().unwrap(), header.uid().unwrap(), header.mtime().unwrap());
        assert_eq!((header.gid().unwrap(), mtime), (uid, 1_000_000_000));
        lines.push(format!("{mode:o} {uid} {}", attributes.join(" ")));
    }
    assert_eq!(lines, ["700 7 ", "1750 100000 SCHILY.xattr.user.note", "666 0 ", "755 0 "]);
}

/// Whatever bytes of a layer are changed, it is refused, or is another one.
#[test]
fn damaged_layers_end_nothing() {
    let folders = layer().folder("a", 0o755, 0).attributes(&[("user.x", b"y")]).file("a/b", "content").link("l", "a/b");
    let good = folders.hard_link("h", "a/b").file("a/.wh..wh..opq", "").file(".wh.l", "").bytes();
    let mut random = Random::new();
    let (mut refused, mut taken) = (0, 0);
    for _ in 0..4000 {
        let mut bytes = good.clone();
        for _ in 0..1 + random.below(6) {
            let at = random.below(bytes.len());
            bytes[at] = random.byte();
        }
        if random.one_in(4) {
            bytes.truncate(random.below(good.len()));
        }
        // Most changes are found by the sum over a header: the sum is made right again.
        for at in (0..bytes.len().saturating_sub(511)).step_by(512) {
            if random.one_in(2) && bytes[at] != 0 {
                let header: &mut [u8; 512] = (&mut bytes[at..at + 512]).try_into().unwrap();
                header[148..156].fill(b' ');
                let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
                header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
            }
        }
        match files_of_any(&bytes) {
            true => taken += 1,
            false => refused += 1,
        }
    }
    assert!(refused > 100 && taken > 100, "{refused} refused, {taken} taken");
}

fn files_of_any(bytes: &[u8]) -> bool {
    archive_of(&[bytes.to_vec()]).is_ok()
}

/// An image whose one layer has this file, with a name in its layout.
fn written(folder: &Path, config: &Value) -> Value {
    let layer = layer().file("etc/passwd", "root:x:0:0::/root:/bin/sh\n").program("run", "x").bytes();
    test_images::image(folder, &[Packed::gzip(&layer), Packed::plain(Layer::default().bytes())], config)
}

/// What is told of the image in a layout; paths are left out.
fn refusal(image: &Path) -> String {
    let scratch = tempfile::tempdir().unwrap();
    let why = open(image).and_then(|(_, manifest, layout)| read(&layout, &manifest, scratch.path())).map(drop);
    let folder = format!("{}/", image.parent().unwrap().display());
    why.map_or_else(|why| format!("{why:#}").replace(&folder, ""), |()| "fine".to_owned())
}

#[test]
fn an_image_is_found_in_a_folder_and_in_an_archive() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, tar) = (folder.path().join("image"), folder.path().join("image.tar"));
    let manifest = written(&dir, &json!({ "User": "root" }));
    let other = json!({ "mediaType": manifest["mediaType"], "digest": format!("sha256:{}", "0".repeat(64)), "size": 1,
        "platform": { "os": "linux", "architecture": "arm64" } });
    let inner = json!({ "schemaVersion": 2, "manifests": [other, manifest] }).to_string();
    let nested = test_images::blob(&dir, "application/vnd.oci.image.index.v1+json", inner.as_bytes());
    test_images::layout(&dir, &[nested]);
    let mut archive = tar::Builder::new(File::create(&tar).unwrap());
    archive.append_dir_all(".", &dir).unwrap();
    archive.finish().unwrap();
    for image in [&dir, &tar] {
        let scratch = tempfile::tempdir().unwrap();
        let (digest, manifest, layout) = open(image).unwrap();
        assert_eq!(digest.to_string().len(), 71);
        let (tree, layers, wishes) = read(&layout, &manifest, scratch.path()).unwrap();
        wishes.user(|path| config::read(&tree, &layers, path)).unwrap();
        assert_eq!(config::read(&tree, &layers, "run").unwrap(), "x");
    }
}

#[test]
fn one_of_several_images_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("images");
    let named = |name: &str, user: &str| {
        let mut manifest = written(&dir, &json!({ "User": user }));
        manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
        manifest
    };
    test_images::layout(&dir, &[named("1.0", "0"), named("2.0", "1")]);
    assert_eq!(refusal(&dir), "2 images for linux on amd64; name one, as PATH:NAME: 1.0, 2.0");
    assert_eq!(refusal(&folder.path().join("images:2.0")), "fine");
    let why = refusal(&folder.path().join("images:3.0"));
    assert_eq!(why, "no image 3.0 for linux on amd64; there are: 1.0, 2.0");
}

#[test]
fn what_is_no_image_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("image");
    let manifest = written(&dir, &json!({}));
    let blob = |digest: &Value| dir.join("blobs/sha256").join(digest.as_str().unwrap().trim_start_matches("sha256:"));
    let text = fs::read_to_string(blob(&manifest["digest"])).unwrap();
    let parts: Value = serde_json::from_str(&text).unwrap();
    let with = |change: &dyn Fn(&mut Value)| {
        let mut changed = parts.clone();
        change(&mut changed);
        let kind = manifest["mediaType"].as_str().unwrap();
        test_images::layout(&dir, &[test_images::blob(&dir, kind, changed.to_string().as_bytes())]);
        refusal(&dir)
    };
    assert_eq!(with(&|_| {}), "fine");
    assert!(
        with(&|it| it["config"]["mediaType"] = json!("text/plain"))
            .ends_with("no container image, but one of text/plain")
    );
    assert!(
        with(&|it| it["layers"][0]["mediaType"] = json!("x")).ends_with("a layer of the type \"x\" is not supported")
    );
    assert!(with(&|it| it["layers"][0]["digest"] = json!("md5:1")).ends_with("no digest but sha256 is supported"));
    assert!(with(&|it| it["layers"][0]["digest"] = json!("sha256:../../x")).ends_with("is no digest"));
    assert!(with(&|it| it["layers"] = json!([])).ends_with("0 layers, and digests of 2"));
    assert!(with(&|it| it["layers"][0] = it["layers"][1].clone()).contains("unpacked it has the digest sha256:"));
    assert!(with(&|it| it["layers"][0]["size"] = json!(1)).contains("bytes, and should have 1"));
    let layer = blob(&parts["layers"][0]["digest"]);
    let good = fs::read(&layer).unwrap();
    let (mut bad, mut short) = (good.clone(), good.clone());
    *bad.last_mut().unwrap() ^= 1;
    short.pop();
    for (bytes, why) in [(bad, "damaged: sha256:"), (short, "bytes, and should have")] {
        fs::write(&layer, bytes).unwrap();
        let refusal = with(&|_| {});
        assert!(refusal.contains(why), "{refusal} is not: {why}");
    }
    fs::remove_file(&layer).unwrap();
    assert!(with(&|_| {}).contains("image has no blobs/sha256/"));
    fs::write(&layer, good).unwrap();
    test_images::layout(&dir, &[]);
    assert_eq!(refusal(&dir), "no image for linux on amd64");
    fs::write(dir.join("index.json"), "{").unwrap();
    assert!(refusal(&dir).starts_with("index.json: not what it should be"));
    fs::write(dir.join("oci-layout"), "{\"imageLayoutVersion\":\"2.0\"}").unwrap();
    assert_eq!(refusal(&dir), "oci-layout: version 2.0 is not supported");
    fs::write(folder.path().join("text"), "no image").unwrap();
    assert!(refusal(&folder.path().join("text")).starts_with("text: no folder with an image, and no archive of one"));
    assert!(refusal(&folder.path().join("none")).starts_with("no image none: "));
    fs::create_dir(folder.path().join("old")).unwrap();
    assert!(refusal(&folder.path().join("old")).starts_with("old is no OCI image layout"));
    fs::write(folder.path().join("old/manifest.json"), "[]").unwrap();
    assert!(refusal(&folder.path().join("old")).starts_with("old is in Docker's own format"));
    assert!(Layout::open(&folder.path().join("none")).is_err());
}

/// An index that holds itself, by the digest of another.
#[test]
fn indexes_are_not_read_without_end() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("image");
    let kind = "application/vnd.oci.image.index.v1+json";
    let mut index = written(&dir, &json!({}));
    for _ in 0..6 {
        let text = json!({ "schemaVersion": 2, "manifests": [index] }).to_string();
        index = test_images::blob(&dir, kind, text.as_bytes());
    }
    test_images::layout(&dir, &[index]);
    assert!(refusal(&dir).ends_with("an index in an index in an index"), "{}", refusal(&dir));
}
