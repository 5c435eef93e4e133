"""Small helpers without a place in the data flow: errors, files, logging. Imports no other
package."""
