//! Bundles as xtask writes them, and damaged ones.

mod archive;

use archive::archive;
use toolstack::bundle::{Bundle, BundleError};

const WEB: &[u8] = b"name = 'web'\nmemory = 16\nkernel = 'guests/web/kernel'\nramdisk = 'shared'\n";
const SMALL: &[u8] = b"name = 'small'\nmemory = 1\nkernel = 'shared'\n";

#[test]
fn guests_come_in_order_with_what_they_name() {
    let bytes = archive(&[
        ("dom0", b"ELF"),
        ("guests/web/config", WEB),
        ("guests/web/kernel", b"KERNEL"),
        ("guests/small/config", SMALL),
        ("shared", b"12345"),
        ("elsewhere/config", b"no configuration"),
        ("disks/base", b"sectors"),
        ("dom0.forwards", b"tcp:2222:web:22\nnonsense\n"),
    ]);
    let bundle = Bundle::new(&bytes);
    let guests: Vec<_> = bundle.guests().map(Result::unwrap).collect();
    let names: Vec<&str> = guests.iter().map(|guest| guest.name.as_str()).collect();
    assert_eq!(names, ["web", "small"]);
    let both: (&[u8], &[u8]) = (b"KERNEL", b"12345");
    assert_eq!(bundle.images(&guests[0]), Ok(both));
    assert_eq!(bundle.images(&guests[1]).unwrap().1, b"");
    let forwards: Vec<_> = bundle.forwards().collect();
    assert_eq!(forwards[0], Ok("2222:web:22".parse().unwrap()));
    assert!(forwards.len() == 2 && forwards[1].as_ref().unwrap_err().starts_with("`nonsense`"), "{forwards:?}");
    assert_eq!(bundle.disks().collect::<Vec<_>>(), [("disks/base", b"sectors".as_slice())]);
    assert_eq!(bundle.entry("dom0"), Some(b"ELF".as_slice()));
}

#[test]
fn what_is_wrong_is_named() {
    let bytes = archive(&[
        ("guests/a/config", b"name = 'a'\nmemory = 'much'\nkernel = 'k'\n"),
        ("guests/b/config", b"\xff"),
        ("guests/web/config", WEB),
    ]);
    let bundle = Bundle::new(&bytes);
    let guests: Vec<_> = bundle.guests().collect();
    let text = guests[0].as_ref().unwrap_err().to_string();
    assert!(text.starts_with("guests/a/config: line 2: memory: "), "{text}");
    assert_eq!(guests[1], Err(BundleError::NotText("guests/b/config".into())));
    let missing = bundle.images(guests[2].as_ref().unwrap()).unwrap_err().to_string();
    assert_eq!(missing, "guest web: the boot bundle has no entry `guests/web/kernel`");
}

#[test]
fn no_archive_and_a_cut_one_are_no_guests() {
    assert_eq!(Bundle::new(b"").guests().count(), 0);
    assert_eq!(Bundle::new(b"no archive at all").guests().count(), 0);
    let bytes = archive(&[("guests/web/config", WEB), ("guests/small/config", SMALL)]);
    for length in 0..bytes.len() {
        assert!(Bundle::new(&bytes[..length]).guests().count() <= 2);
    }
}
